"""Rules that take a challenger out, and challengers that hang, are slow, or disagree."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill import contract, rollout
from driftmill.bundle import Manifest
from driftmill.contract import Abort, Contract
from driftmill.serving.canary import Watch
from driftmill.serving.log import read, segments
from driftmill.serving.versions import Model
from driftmill.store import Store
from tests.serving.test_server import RECORD, go, metric, predict, promote, running, until

MakeBundle = Callable[..., Manifest]
#: Makes the `hanging` model of the tests hang.
HANGS = RECORD | {"amount": 900.0}


def with_rules(tiny: Contract, **abort: Any) -> Contract:
    """The tiny contract with a fast poll and some rules."""
    values = json.loads(tiny.to_json())
    values["serve"] |= {
        "poll": 0.02,
        "log": {"rotate": 0.05},
        "canary": {"abort": {"timeout": 0.3, "window": 20, **abort}},
    }
    return contract.parse(json.dumps(values))


def seen(watch: Watch, champion: float, challenger: float, times: int = 20) -> str | None:
    for _ in range(times):
        watch.answered("champion", champion)
        watch.answered("challenger", challenger)
    return watch.verdict()


def test_a_slow_challenger_goes_and_a_slow_machine_is_not_its_fault() -> None:
    rules = Abort(window=20)
    assert seen(Watch(rules, slow=0.1), champion=0.01, challenger=0.02) is None
    reason = seen(Watch(rules, slow=0.1), champion=0.01, challenger=0.2)
    assert reason == "was slower than 100 ms in 100% of its answers, the champion in 0%"
    assert seen(Watch(rules, slow=0.1), champion=0.2, challenger=0.2) is None
    assert seen(Watch(Abort(window=20, slow=None), slow=0.1), 0.01, 0.2) is None
    assert seen(Watch(rules, slow=0.1), champion=0.01, challenger=0.2, times=19) is None


def test_each_window_is_judged_by_itself() -> None:
    watch = Watch(Abort(window=20), slow=0.1)
    for _ in range(50):
        assert seen(watch, champion=0.01, challenger=0.01) is None
    assert seen(watch, champion=0.01, challenger=0.2) is not None


@given(st.lists(st.booleans(), min_size=10, max_size=10), st.floats(0.05, 0.95))
def test_disagreement_is_the_share_of_rows(differs: list[bool], allowed: float) -> None:
    watch = Watch(Abort(window=10, disagreement=allowed), slow=0.1)
    watch.compared(["a"] * 10, ["b" if d else "a" for d in differs])
    assert (watch.verdict() is not None) == (sum(differs) / 10 > allowed)


def test_numbers_within_the_tolerance_agree() -> None:
    watch = Watch(Abort(window=4, disagreement=0.4, tolerance=0.5), slow=0.1)
    watch.compared([1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 3.4, 9.0])
    assert watch.verdict() is None
    watch.compared([1.0, 2.0, 3.0, 4.0], [1.6, 2.0, 3.4, 9.0])
    assert watch.verdict() == "disagreed with the champion on 50% of the rows"


@pytest.mark.parametrize(
    "how", [{"weight": 1.0}, {"shadow": True}, {"weight": 0.5, "shadow": True}]
)
def test_a_challenger_that_hangs_is_cut_off_and_nobody_waits_for_it(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path, how: dict[str, Any]
) -> None:
    of = with_rules(tiny)
    old, new = make_bundle(of=of), make_bundle(of=of, hangs=True)
    promote(store, old, challenger=new.version, **how)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            challenger = server.versions.serving.challenger  # type: ignore[union-attr]
            assert challenger is not None
            assert (await predict(client, RECORD)).status_code == 200
            answers = await asyncio.gather(*(predict(client, HANGS) for _ in range(40)))
            assert {a.status_code for a in answers} == {200}
            assert {a.json()["version"] for a in answers} == {old.version}
            await until(lambda: len(rollout.history(store, "tiny")) == 2)
            assert (await predict(client, HANGS)).json()["version"] == old.version
            assert metric(server, "model_challenger_failures_total", version=new.version) >= 1
            # What it computed has really ended: its threads take other work again.
            threads = challenger.worker if how.get("weight") == 1.0 else challenger.aside
            await asyncio.wait_for(asyncio.wrap_future(threads.submit(int)), 20)

    go(check())
    last = rollout.history(store, "tiny")[-1]
    assert (last.champion, last.challenger, last.by) == (old.version, None, "service")
    assert "gave no answer within 0.3 s" in last.reason
    rows = read(store, segments(store, "tiny", "predictions"))
    assert len(rows[(rows["_version"] == old.version) & (rows["amount"] == 900)]) == 41
    assert not len(rows[(rows["_version"] == new.version) & (rows["amount"] == 900)])


def test_a_version_that_hung_is_loaded_anew_when_it_comes_again(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    of = with_rules(tiny)
    old, new = make_bundle(of=of), make_bundle(of=of, hangs=True)
    promote(store, old, challenger=new.version, weight=1.0)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            await predict(client, HANGS)
            await until(lambda: len(rollout.history(store, "tiny")) == 2)
            promote(store, new)
            await until(lambda: server.versions.serving.champion.version == new.version)  # type: ignore[union-attr]
            assert (await predict(client, RECORD)).json()["version"] == new.version

    go(check())


@pytest.mark.parametrize("how", [{"weight": 1.0}, {"shadow": True}])
@pytest.mark.parametrize("allowed", [0.2, None])
def test_a_challenger_that_disagrees(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    how: dict[str, Any],
    allowed: float | None,
) -> None:
    of = with_rules(tiny, disagreement=allowed)
    old, new = make_bundle(0.02, of), make_bundle(-0.02, of)
    promote(store, old, challenger=new.version, **how)

    async def check() -> None:
        async with running(store, tmp_path) as (server, client):
            for _ in range(60):
                assert (await predict(client)).status_code == 200
            if allowed is None:
                assert server.versions.serving.challenger is not None  # type: ignore[union-attr]
                return
            await until(lambda: len(rollout.history(store, "tiny")) == 2)
            assert (await predict(client)).json()["version"] == old.version

    go(check())
    if allowed is not None:
        assert "disagreed with the champion on 100%" in rollout.history(store, "tiny")[-1].reason


def test_a_slow_challenger_is_taken_out(
    store: Store,
    make_bundle: MakeBundle,
    tiny: Contract,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = with_rules(tiny)
    old, new = make_bundle(0.02, of), make_bundle(0.03, of)
    promote(store, old, challenger=new.version, weight=0.5)
    run = Model.run

    def slowly(self: Model, *arguments: Any) -> Any:
        if self.version == new.version:
            delay.wait(0.12)  # above the 100 ms of the contract's objective
        return run(self, *arguments)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            monkeypatch.setattr(Model, "run", slowly)
            while len(rollout.history(store, "tiny")) == 1:
                await asyncio.gather(*(predict(client) for _ in range(8)))

    delay = threading.Event()
    go(check())
    assert "was slower than 100 ms" in rollout.history(store, "tiny")[-1].reason


def test_requests_with_a_routing_key_stay_together(
    store: Store, make_bundle: MakeBundle, tiny: Contract, tmp_path: Path
) -> None:
    of = with_rules(tiny)
    old, new = make_bundle(0.02, of), make_bundle(0.03, of)
    promote(store, old, challenger=new.version, weight=0.5)

    async def check() -> None:
        async with running(store, tmp_path) as (_, client):
            versions = set()
            for key in ("anna", "ben", "carla", "dora", "emil"):
                asked = [
                    await client.post(
                        "/predict", json={"records": [RECORD]}, headers={"x-routing-key": key}
                    )
                    for _ in range(8)
                ]
                by_key = {a.json()["version"] for a in asked}
                assert len(by_key) == 1
                assert len({a.headers["x-request-id"] for a in asked}) == 8
                versions |= by_key
            assert versions == {old.version, new.version}
            refused = await client.post("/predict", headers={"x-routing-key": "a" * 129})
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                400,
                "invalid_routing_key",
            )

    go(check())
