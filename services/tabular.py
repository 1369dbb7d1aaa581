"""The BentoML service of a tabular model.

    python -m services.tabular --model payments --port 3000       # one process, fastest
    DRIFTMILL_MODEL=payments bentoml serve services.tabular:Service
    bentoml build -f services/bentofile.yaml .

`services/bento.py` says how it is set up.
"""

from __future__ import annotations

from typing import Any

import msgspec

from services.bento import api, content, main, mount, predict, server, service


@service(name="driftmill-tabular")
class Service:
    """A tabular model, for BentoML's client; over HTTP the handler answers the same routes."""

    @api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Predict one record or many."""
        return await predict(msgspec.json.encode({"records": records}))

    @api(route="/feedback")  # type: ignore[untyped-decorator]
    async def feedback(self, labels: list[dict[str, Any]]) -> dict[str, Any]:
        """Give labels of earlier predictions, by id."""
        return content(server().feedback(msgspec.json.encode({"labels": labels})))


mount(Service)

if __name__ == "__main__":
    main(Service, "services.tabular", __doc__ or "")
