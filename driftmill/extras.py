"""Which extra of the package brings what is not installed."""

from __future__ import annotations

#: Packages of the extra `vision`; all others come with `laptop`.
VISION = {"torch", "torchvision", "safetensors", "onnxscript"}


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install, in one sentence; None where the missing module is Driftmill's own."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "driftmill", "components", "pipelines", "services"):
        return None
    wanted = "laptop,vision" if package in VISION else "laptop"
    return f"this needs the package {package}; pip install 'driftmill[{wanted}]'"
