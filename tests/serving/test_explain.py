"""Explanations: sums, exactness against every coalition, repeatability, limits, and images."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill import bundle, contract, features, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Contract
from driftmill.features import Signature
from driftmill.serving import explain
from driftmill.serving.explain import Background, explained, orders_of, sample
from driftmill.serving.log import segments
from driftmill.serving.versions import Model
from driftmill.store import Store
from tests.conftest import tiny_frame
from tests.serving.pictures import picture, put_bundle, shades
from tests.serving.test_server import RECORD, go, metric, promote, running, until

MakeBundle = Callable[..., Manifest]
CHANNELS = ("web", "app", "")


def with_explain(of: Contract, **settings: Any) -> Contract:
    """A contract with a fast poll and log and such explanations."""
    values = json.loads(of.to_json())
    values["serve"] |= {"poll": 0.02, "log": {"rotate": 0.05}, "explain": settings}
    return contract.parse(json.dumps(values))


def signature_of(columns: str) -> Signature:
    """A model with a number for each `n` and a category for each `c`."""
    return Signature.model_validate(
        {
            "task": "classification",
            "columns": [
                {"name": f"x{i}", "type": "float" if kind == "n" else "category"}
                for i, kind in enumerate(columns)
            ],
            "target": "y",
            "labels": ["no", "yes"],
        }
    )


def model_of(signature: Signature, seed: int) -> Callable[..., np.ndarray]:
    """A model in which all columns act upon each other."""
    rng = np.random.default_rng(seed)
    width = len(signature.columns)
    weights, pairs = rng.normal(size=width), rng.normal(size=(width, width))
    at_numbers = [i for i, c in enumerate(signature.columns) if c.is_numeric]
    at_texts = [i for i, c in enumerate(signature.columns) if not c.is_numeric]

    def ask(numeric: np.ndarray, texts: np.ndarray) -> np.ndarray:
        x = np.zeros((len(numeric), width))
        x[:, at_numbers] = numeric
        x[:, at_texts] = np.vectorize(CHANNELS.index, otypes=[float])(texts)
        z = x @ weights + np.einsum("ri,ij,rj->r", x, pairs, x) / 4
        p = 1 / (1 + np.exp(-z))
        return np.stack([1 - p, p], axis=1).astype(np.float32)

    return ask


def rows_of(
    signature: Signature, rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    numeric = rng.normal(size=(rows, len(signature.numeric))).astype(np.float32)
    texts = rng.choice(np.array(CHANNELS, object), (rows, len(signature.categorical)))
    return numeric, texts


def case(
    columns: str, rows: int, samples: int, seed: int
) -> tuple[Callable[..., np.ndarray], tuple[np.ndarray, np.ndarray], Background, Signature]:
    signature, rng = signature_of(columns), np.random.default_rng(seed)
    ask = model_of(signature, seed)
    reference = rows_of(signature, rows, rng)
    numeric, texts = rows_of(signature, 1, rng)
    orders = orders_of(len(columns), rows, samples)
    background = Background(reference, ask(*reference), orders)
    return ask, (numeric[0], texts[0]), background, signature


def brute_force(
    ask: Callable[..., np.ndarray],
    record: tuple[np.ndarray, np.ndarray],
    background: Background,
    signature: Signature,
) -> list[float]:
    """Shapley values by their definition: over all coalitions of the other columns."""
    width = len(signature.columns)
    names = [c.name for c in signature.columns]

    def value(coalition: frozenset[int]) -> float:
        mixed = [part.copy() for part in background.arrays]
        for i in coalition:
            kind = 0 if signature.columns[i].is_numeric else 1
            place = (signature.numeric, signature.categorical)[kind].index(names[i])
            mixed[kind][:, place] = record[kind][place]
        return float(ask(*mixed)[:, 1].astype(np.float64).mean())

    values = []
    for i in range(width):
        others = [j for j in range(width) if j != i]
        total = 0.0
        for size in range(width):
            weight = math.factorial(size) * math.factorial(width - size - 1) / math.factorial(width)
            for chosen in itertools.combinations(others, size):
                before = frozenset(chosen)
                total += weight * (value(before | {i}) - value(before))
        values.append(total)
    return values


@given(
    columns=st.text("nc", min_size=1, max_size=8),
    rows=st.integers(1, 20),
    samples=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_contributions_add_up(columns: str, rows: int, samples: int, seed: int) -> None:
    ask, record, background, signature = case(columns, rows, samples, seed)
    found = explained(ask, record, background, signature)
    assert found.contributions is not None
    assert found.score is not None
    assert found.base is not None
    assert list(found.contributions) == [c.name for c in signature.columns]
    total = math.fsum(found.contributions.values())
    assert total == pytest.approx(found.score - found.base, abs=1e-12)
    assert found.base == pytest.approx(background.output[:, 1].astype(float).mean())
    (output,) = ask(*(part[None] for part in record))
    assert (found.score, found.label) == (output[1], "yes")
    assert found.prediction == ("yes" if output[1] > output[0] else "no")
    assert explained(ask, record, background, signature) == found


@pytest.mark.parametrize("columns", ["n", "cn", "ncn", "ccnn"])
def test_they_are_exact_where_every_order_is_walked(columns: str) -> None:
    samples = max(1, math.factorial(len(columns)) // 2)
    asked = case(columns, 7, samples, seed=3)
    assert len(asked[2].orders[0]) == math.factorial(len(columns))
    found = explained(*asked).contributions
    assert found is not None
    np.testing.assert_allclose([*found.values()], brute_force(*asked), atol=1e-6)


def test_of_several_labels_the_chosen_one_is_explained() -> None:
    signature = signature_of("nn").model_copy(update={"labels": ("a", "b", "c")})

    def ask(numeric: np.ndarray, texts: np.ndarray) -> np.ndarray:
        powers = np.exp(numeric @ np.array([[0, 1, 2], [2, 0, 1]]))
        shares: np.ndarray = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    reference = rows_of(signature, 9, np.random.default_rng(0))
    background = Background(reference, ask(*reference), orders_of(2, 9, 1))
    for record, label in (([0.0, 1.0], 0), ([1.0, 0.0], 2)):
        inputs = np.array(record, np.float32), np.empty(0, object)
        found = explained(ask, inputs, background, signature)
        assert found.prediction == found.label == "abc"[label]
        assert found.base == pytest.approx(background.output[:, label].astype(float).mean())
        assert found.contributions is not None
        assert found.score is not None
        assert found.base is not None
        assert found.score == ask(*(part[None] for part in inputs))[0, label]
        total = math.fsum(found.contributions.values())
        assert total == pytest.approx(found.score - found.base, abs=1e-12)


def test_of_a_sum_each_column_gives_its_own_part() -> None:
    """A linear regression: weight times distance from the mean, whatever the orders."""
    signature = signature_of("nnnn").model_copy(update={"task": "regression", "labels": ()})
    weights = np.array([3.0, -2.0, 0.5, 0.0], np.float32)

    def ask(numeric: np.ndarray, texts: np.ndarray) -> np.ndarray:
        numbers: np.ndarray = numeric @ weights
        return numbers

    reference = rows_of(signature, 11, np.random.default_rng(1))
    background = Background(reference, ask(*reference), orders_of(4, 11, 2))
    record = np.array([1, 2, 3, 4], np.float32)
    found = explained(ask, (record, np.empty(0, object)), background, signature)
    assert (found.prediction, found.label, found.score) == (0.5, None, None)
    assert found.contributions is not None
    expected = weights * (record - reference[0].mean(axis=0))
    np.testing.assert_allclose([*found.contributions.values()], expected, atol=1e-5)


def test_more_orders_come_closer_to_the_exact_values() -> None:
    exact = np.array(brute_force(*case("ncnncn", 20, 1, seed=5)))

    def error(samples: int) -> float:
        found = explained(*case("ncnncn", 20, samples, seed=5)).contributions
        assert found is not None
        return float(np.abs(np.array([*found.values()]) - exact).max())

    assert error(100) < 0.005 < 0.1 * np.abs(exact).max()
    assert error(100) < error(1) < 0.05


@given(width=st.integers(1, 40), rows=st.integers(1, 5), samples=st.integers(1, 5))
def test_orders_are_walked_forwards_and_backwards(width: int, rows: int, samples: int) -> None:
    orders = orders_of(width, rows, samples)
    assert (np.sort(orders, axis=2) == np.arange(width)).all()
    for row in orders:
        walks = {tuple(walk) for walk in row}
        assert walks == {walk[::-1] for walk in walks}


@pytest.mark.parametrize("rows", [3, 50, 5000])
def test_the_background_is_what_training_would_make_of_the_same_rows(
    tiny: Contract, rows: int
) -> None:
    frame = tiny_frame(1000)
    frame.loc[::7, "channel"] = None
    sign = features.signature(tiny, frame)
    numeric, texts = sample(frame.to_parquet(index=False), sign, rows)
    chosen = np.linspace(0, 999, min(rows, 1000)).round().astype(int)
    expected = features.arrays(frame.iloc[chosen], sign)
    np.testing.assert_array_equal(numeric, expected[0])
    np.testing.assert_array_equal(texts, expected[1])
    assert numeric.dtype == np.float32


def test_booleans_and_numbers_with_gaps_are_read(tiny: Contract) -> None:
    values = json.loads(tiny.to_json())
    values["data"]["columns"].append({"name": "member", "type": "bool", "nullable": True})
    frame = tiny_frame(4).assign(
        age=pd.array([1, None, 3, 4], dtype="Int64"),
        member=pd.array([True, None, False, True], dtype="boolean"),
    )
    sign = features.signature(contract.parse(json.dumps(values)), frame)
    numeric, _ = sample(frame.to_parquet(index=False), sign, 4)
    np.testing.assert_array_equal(numeric[:, 1:], [[1, 1], [np.nan, np.nan], [3, 0], [4, 1]])


def test_an_answer_fits_the_prediction(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=with_explain(tiny, rate=1000))
    promote(store, manifest)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            body = {"records": [RECORD, {"amount": 100, "channel": "app"}]}
            response = await client.post("/explain", json=body, headers={"x-request-id": "a"})
            assert response.status_code == 200
            assert response.headers["x-model-version"] == manifest.version
            assert response.headers["x-request-id"] == "a"
            answer = response.json()
            assert (answer["model"], answer["version"]) == ("tiny", manifest.version)
            predicted = (await client.post("/predict", json=body)).json()["predictions"]
            for one, other in zip(answer["explanations"], predicted, strict=True):
                assert one["prediction"] == other["prediction"]
                assert one["score"] == pytest.approx(other["score"])
                assert one["label"] == "yes"
                shares = one["contributions"]
                assert sum(shares.values()) == pytest.approx(one["score"] - one["base"])
                # The model looks at the amount alone.
                assert (shares["age"], shares["channel"]) == (0, 0)
                assert (shares["amount"] > 0) == (other["prediction"] == "yes")
            again = await client.post("/explain", json=body)
            assert again.content == response.content
            assert metric(server, "model_explanations_total", code="200") == 2
            assert metric(server, "model_explanation_duration_seconds_count") == 2
            assert metric(server, "model_predictions_total", version=manifest.version) == 0

    go(check())
    # An explanation is no prediction.
    (segment,) = segments(store, "tiny", "predictions")
    assert len(pd.read_parquet(tmp_path / "store" / segment)) == 2


def test_mistakes_are_answered_as_of_predict(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=1000, max_records=2)))

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):

            async def error(**request: Any) -> tuple[int, str, str | None]:
                response = await client.post("/explain", **request)
                found = response.json()["error"]
                return response.status_code, found["code"], found.get("path")

            typo = {"records": [{**RECORD, "amount": "5"}]}
            assert await error(json=typo) == (422, "invalid_field", "$.records[0].amount")
            assert await error(json={"records": [RECORD] * 3}) == (
                422,
                "invalid_field",
                "$.records",
            )
            kind = {"content-type": "application/json"}
            assert (await error(content=b"{", headers=kind))[0] == 400
            assert (await error(data={"a": "1"}))[0] == 415
            assert (await client.get("/explain")).status_code == 405
            assert metric(server, "model_explanations_total", code="422") == 2

    go(check())


def test_what_is_beyond_the_rate_is_told_when_to_come_again(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=0.01)))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            first = await client.post("/explain", json={"records": [RECORD]})
            second = await client.post("/explain", json={"records": [RECORD]})
            assert (first.status_code, second.status_code) == (200, 429)
            assert second.json()["error"]["code"] == "too_many_requests"
            assert 90 < int(second.headers["retry-after"]) <= 100

    go(check())


def test_it_can_be_switched_off(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=0)))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            response = await client.post("/explain", json={"records": [RECORD]})
            assert response.status_code == 404
            assert "serve.explain.rate" in response.json()["error"]["message"]

    go(check())


def test_a_version_of_a_remote_store_is_explained_after_its_copy_has_gone(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    manifest = make_bundle(of=with_explain(tiny, rate=1000))
    key = bundle.key("tiny", manifest.version)
    remote = Store("memory://explained")
    remote.put_folder(tmp_path / "store" / key, key, bundle.MANIFEST)
    promote(remote, manifest)

    async def check() -> None:
        async with running(remote, tmp_path) as (server, client):
            assert server.versions.serving is not None
            assert not server.versions.serving.champion.bundle.folder.exists()
            body = {"records": [RECORD]}
            damaged, whole = b"rows of somebody else", remote.read(f"{key}/reference.parquet")
            remote.write(f"{key}/reference.parquet", damaged)
            response = await client.post("/explain", json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "reference_unavailable"
            assert response.headers["retry-after"]
            remote.write(f"{key}/reference.parquet", whole)
            assert (await client.post("/explain", json=body)).status_code == 200

    go(check())


def test_a_request_is_explained_by_the_version_that_answers_it(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    of = with_explain(tiny, rate=1000)
    first, second = make_bundle(0.02, of=of), make_bundle(0.001, of=of)
    promote(store, first, challenger=second.version, weight=0.5)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            versions = set()
            for name in "abcdefgh":
                headers, body = {"x-request-id": name}, {"records": [RECORD]}
                why = await client.post("/explain", json=body, headers=headers)
                what = await client.post("/predict", json=body, headers=headers)
                assert why.json()["version"] == what.json()["version"]
                assert why.json()["explanations"][0]["score"] == pytest.approx(
                    what.json()["predictions"][0]["score"]
                )
                versions.add(why.json()["version"])
            assert versions == {first.version, second.version}

    go(check())


def test_one_at_a_time_in_a_thread_of_its_own(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=1000)))
    goes_on, asked_by, most, running_now = threading.Event(), set(), 0, 0
    ask = Model.ask

    def slow(*arguments: Any) -> np.ndarray:
        nonlocal most, running_now
        asked_by.add(threading.current_thread().name)
        running_now += 1
        most = max(most, running_now)
        assert goes_on.wait(20)
        running_now -= 1
        return ask(*arguments)

    monkeypatch.setattr(Model, "ask", slow)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            body = {"records": [RECORD]}
            waiting = [
                asyncio.create_task(client.post("/explain", json=body))
                for _ in range(explain.WAITING)
            ]
            await until(lambda: server.explainer._waiting == explain.WAITING and bool(asked_by))
            full = await client.post("/explain", json=body)
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            # Predictions do not wait for it.
            assert (await client.post("/predict", json=body)).status_code == 200
            patience = {"x-request-timeout": "0.01"}
            waiting.pop().cancel()
            await until(lambda: server.explainer._waiting < explain.WAITING)
            late = await client.post("/explain", json=body, headers=patience)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            goes_on.set()
            assert {r.status_code for r in await asyncio.gather(*waiting)} == {200}

    go(check())
    assert most == 1
    assert {name.partition("_")[0] for name in asked_by} == {"explain"}


def test_a_service_that_stops_does_not_wait_for_explanations(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote(store, make_bundle(of=with_explain(tiny, rate=1000, samples=100, background=1000)))
    monkeypatch.setattr(explain, "BATCH_ROWS", 1)  # hours, unless it is ended
    begun = threading.Event()
    ask = Model.ask

    def counted(*arguments: Any) -> np.ndarray:
        begun.set()
        return ask(*arguments)

    monkeypatch.setattr(Model, "ask", counted)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            task = asyncio.create_task(client.post("/explain", json={"records": [RECORD] * 10}))
            await until(begun.is_set)
        assert (await task).status_code == 500

    go(check())


def test_a_model_that_breaks_is_no_answer(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    # It answers NaN for amounts above 850; the reference has one of 1000 but rarely.
    promote(store, make_bundle(4e35, of=with_explain(tiny, rate=1000)))

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            response = await client.post("/explain", json={"records": [{**RECORD, "amount": 900}]})
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "model_failed"

    go(check())


def test_the_map_of_an_image_shows_what_spoke_for_its_label(store: Store, tmp_path: Path) -> None:
    of = shades(serve={"explain": {"rate": 1000}}, image={"size": (14, 21)})
    manifest = put_bundle(store, tmp_path, of)
    rollout.change(store, "shades", champion=manifest.version, by="test")

    async def check() -> None:
        async with running(store, tmp_path, model="shades") as (_, client):
            headers = {"content-type": "image/png"}
            content = picture(160, (21, 14))
            response = await client.post("/explain", content=content, headers=headers)
            predicted = await client.post("/predict", content=content, headers=headers)
            (why,) = response.json()["explanations"]
            (what,) = predicted.json()["predictions"]
            assert why["prediction"] == what["prediction"] == why["label"] == "light"
            assert why["score"] == pytest.approx(what["score"])
            lost = np.array(why["map"])
            assert lost.shape == (explain.GRID, explain.GRID)
            # Patches lighter than the mean speak for it, darker ones against it.
            assert (lost > 0).any()
            assert (lost < 0).any()
            assert "contributions" not in why
            bad = await client.post("/explain", content=b"GIF", headers=headers)
            assert bad.status_code == 415

    go(check())
