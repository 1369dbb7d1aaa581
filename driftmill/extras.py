"""Which extra of the package brings what is not installed."""

from __future__ import annotations

#: Packages of the extra `vision`.
VISION = {"torch", "torchvision", "safetensors", "onnxscript"}
#: Packages of the extra `cluster`, and of `s3`; all others come with `laptop`.
CLUSTER, S3 = {"docker", "kubernetes"}, {"botocore"}


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install, in one sentence; None where the missing module is Driftmill's own."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "driftmill", "components", "pipelines", "services", "k8s"):
        return None
    wanted = "laptop,vision" if package in VISION else "cluster" if package in CLUSTER else "laptop"
    wanted = "s3" if package in S3 else wanted
    return f"this needs the package {package}; pip install 'driftmill[{wanted}]'"
