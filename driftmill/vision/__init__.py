"""Models of images: what an image is, networks, their training, export and explanation.

`images` and `corruptions` need Pillow and NumPy alone and are all that serving imports; everything
else needs PyTorch (the extra `vision`).
"""
