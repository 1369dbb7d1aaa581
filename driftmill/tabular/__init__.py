"""Tabular models: candidates, their search, export to ONNX, and the choice of the best."""

#: What `fit` leaves in its folder: the exported model, and how it was found.
MODEL, RECORD = "model.onnx", "fit.json"
