"""The BentoML service of a model of images.

    python -m services.vision --model digits --port 3000          # one process, fastest
    DRIFTMILL_MODEL=digits bentoml serve services.vision:Service
    bentoml build -f services/bentofile-vision.yaml .

`services/bento.py` says how it is set up. ONNX Runtime and Pillow are all that it needs of images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from services.bento import api, content, main, mount, predict, server, service


@service(name="driftmill-vision")
class Service:
    """A model of images, for BentoML's client; over HTTP the handler answers the same routes."""

    @api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Predict images, as base64: `{"image": ...}`."""
        return await predict(msgspec.json.encode({"records": records}))

    @api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict_file(self, image: Path) -> dict[str, Any]:
        """Predict one image file."""
        return await predict(image.read_bytes(), "application/octet-stream")

    @api(route="/feedback")  # type: ignore[untyped-decorator]
    async def feedback(self, labels: list[dict[str, Any]]) -> dict[str, Any]:
        """Give labels of earlier predictions, by id."""
        return content(server().feedback(msgspec.json.encode({"labels": labels})))


mount(Service)

if __name__ == "__main__":
    main(Service, "services.vision", __doc__ or "")
