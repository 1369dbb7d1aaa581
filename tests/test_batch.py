"""Scoring of Parquet sets: the service's answers, by the column, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driftmill import batch, bundle
from driftmill.batch import BatchError
from driftmill.bundle import Bundle
from driftmill.contract import Contract
from driftmill.serving.codec import RequestError, codec_for
from driftmill.store import Store
from tests.conftest import tiny_frame

Make = Callable[..., bundle.Manifest]


@pytest.fixture
def loaded(make_bundle: Make, store: Store) -> Bundle:
    """A model of the `tiny` contract."""
    return bundle.fetch(store, "tiny", make_bundle().version)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 100 rows, batches of 30."""
    monkeypatch.setattr(batch, "PART_ROWS", 100)
    monkeypatch.setattr(batch, "BATCH_ROWS", 30)


def write(path: Path, frame: pd.DataFrame, group: int = 100) -> Path:
    """A Parquet file with row groups of that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False, row_group_size=group)
    return path


def scores(into: Store) -> pd.DataFrame:
    """All scores below a folder, in order."""
    assert into.folder is not None
    return pd.concat([pd.read_parquet(p) for p in sorted(into.folder.glob("part-*.parquet"))])


@pytest.mark.usefixtures("small_parts")
def test_the_answers_are_the_models(loaded: Bundle, tmp_path: Path) -> None:
    """Many parts and batches give what one call of the model gives, in the input's order."""
    frame = tiny_frame(1000)
    write(tmp_path / "in.parquet", frame.assign(customer=range(1000)))
    into = Store(tmp_path / "out")
    seen: list[int] = []
    done = batch.score(
        loaded,
        str(tmp_path / "in.parquet"),
        into,
        keep=["customer"],
        progress=lambda rows, total: seen.append(rows) if total == 1000 else None,
    )
    assert (done.rows, done.problems, done.parts, done.kept) == (1000, 0, 10, 0)
    assert seen[-1] == 1000
    assert seen == sorted(seen)
    result = scores(into)
    assert list(result.columns) == ["customer", "prediction", "score", "problem"]
    assert list(result["customer"]) == list(range(1000))
    expected = bundle.answers(loaded.predict(frame), loaded.signature)
    assert list(result["prediction"]) == list(expected[bundle.PREDICTION])
    np.testing.assert_allclose(result["score"], expected[bundle.SCORE], rtol=1e-6)


VALUES = st.fixed_dictionaries(
    {
        "amount": st.none() | st.floats(-10, 1100) | st.sampled_from([0.0, 1000.0, 1e39]),
        "age": st.none() | st.integers(0, 90) | st.just(30.5),
        "channel": st.none() | st.sampled_from(["web", "app", "Web", "shop", ""]),
    }
)


@pytest.mark.parametrize("unknown", ["allow", "reject"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(VALUES, min_size=1, max_size=30))
def test_it_refuses_what_the_service_refuses(
    make_bundle: Make,
    tiny: Contract,
    store: Store,
    tmp_path: Path,
    unknown: str,
    records: list[dict[str, Any]],
) -> None:
    """Row by row, a problem where the service answers 422, else the service's answer."""
    values = json.loads(tiny.to_json())
    values["data"]["columns"][2] |= {"unknown": unknown, "aliases": {"Web": "web"}}
    contract = Contract.model_validate(values)
    loaded = bundle.fetch(store, "tiny", make_bundle(of=contract).version)
    codec = codec_for(loaded.signature, contract)
    table = pa.table(
        {
            "amount": pa.array([r["amount"] for r in records], pa.float64()),
            "age": pa.array([r["age"] for r in records], pa.float64()),
            "channel": pa.array([r["channel"] for r in records], pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    into = Store(tmp_path / f"out-{len(list(tmp_path.iterdir()))}")
    batch.score(loaded, str(tmp_path / "in.parquet"), into)
    for record, row in zip(records, scores(into).to_dict("records"), strict=True):
        try:
            asked = codec.records(json.dumps({"records": [record]}).encode())
        except RequestError:
            assert row["problem"] is not None
            assert row["prediction"] is None
            assert np.isnan(row["score"])
            continue
        assert row["problem"] is None, (record, row)
        output, _ = codec.run(loaded.session, asked)
        answer = codec.answers(["0"], output)[0]
        assert (row["prediction"], row["score"]) == (answer.prediction, pytest.approx(answer.score))


@pytest.mark.usefixtures("small_parts")
def test_it_goes_on_where_it_was_stopped(loaded: Bundle, tmp_path: Path) -> None:
    """What is finished is not computed again, and the result is that of one call."""
    write(tmp_path / "in" / "a.parquet", tiny_frame(300))
    write(tmp_path / "in" / "b.parquet", tiny_frame(250, seed=1))
    whole = Store(tmp_path / "whole")
    batch.score(loaded, str(tmp_path / "in"), whole)

    class Stopped(RuntimeError):
        """Stands for a process that is killed."""

    def stop(rows: int, total: int) -> None:
        if rows > 330:
            raise Stopped

    into = Store(tmp_path / "out")
    with pytest.raises(Stopped):
        batch.score(loaded, str(tmp_path / "in"), into, progress=stop)
    finished = {key: into.read(key) for key in into.list("") if key.startswith("part-")}
    assert len(finished) == 3
    done = batch.score(loaded, str(tmp_path / "in"), into)
    assert (done.rows, done.parts, done.kept) == (550, 6, 3)
    assert {key: into.read(key) for key in finished} == finished
    pd.testing.assert_frame_equal(scores(into), scores(whole))


def test_a_folder_holds_one_scoring(
    loaded: Bundle, make_bundle: Make, store: Store, tmp_path: Path
) -> None:
    """Another version or other rows do not go into the same folder."""
    rows = write(tmp_path / "in.parquet", tiny_frame(50))
    into = Store(tmp_path / "out")
    batch.score(loaded, str(rows), into)
    other = bundle.fetch(store, "tiny", make_bundle(slope=0.5).version)
    with pytest.raises(BatchError, match="the version was another; name an empty folder"):
        batch.score(other, str(rows), into)
    with pytest.raises(BatchError, match="the kept columns was another"):
        batch.score(loaded, str(rows), into, keep=["age"])
    write(rows, tiny_frame(60))
    with pytest.raises(BatchError, match="the input was another"):
        batch.score(loaded, str(rows), into)


def test_a_dictionary_and_other_types_are_read(loaded: Bundle, tmp_path: Path) -> None:
    """Categories as Parquet keeps them, narrow numbers, booleans for numbers."""
    frame = tiny_frame(40)
    table = pa.table(
        {
            "amount": pa.array(frame["amount"], pa.float32()),
            "age": pa.array([int(a) if a == a else None for a in frame["age"]], pa.int8()),
            "channel": pa.array(frame["channel"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    into = Store(tmp_path / "out")
    assert batch.score(loaded, str(tmp_path / "*.parquet"), into).problems == 0
    expected = bundle.answers(loaded.predict(frame), loaded.signature)
    np.testing.assert_allclose(scores(into)["score"], expected[bundle.SCORE], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rename(columns={"amount": "amuont"}), "no column 'amount'; did you mean 'amu"),
        (lambda f: f.assign(amount="much"), "the column 'amount' holds .*string.*float is needed"),
        (lambda f: f.assign(channel=[[1]] * len(f)), "the column 'channel' holds list.*text"),
    ],
)
def test_what_cannot_be_scored_is_named(
    loaded: Bundle, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    """A wrong input is one sentence."""
    rows = write(tmp_path / "in.parquet", change(tiny_frame(20)))
    with pytest.raises(BatchError, match=message):
        batch.score(loaded, str(rows), Store(tmp_path / "out"))


def test_there_must_be_parquet(loaded: Bundle, tmp_path: Path) -> None:
    """No file, a file of another kind, and a scheme that nobody knows."""
    with pytest.raises(BatchError, match=r"nowhere://rows cannot be read: .*nowhere"):
        batch.score(loaded, "nowhere://rows", Store(tmp_path / "out"))
    with pytest.raises(BatchError, match="there is no Parquet file at"):
        batch.score(loaded, str(tmp_path / "none.parquet"), Store(tmp_path / "out"))
    (tmp_path / "in.parquet").write_text("no")
    with pytest.raises(BatchError, match="is not Parquet"):
        batch.score(loaded, str(tmp_path / "in.parquet"), Store(tmp_path / "out"))


def test_the_command_scores_by_the_champion(
    make_bundle: Make, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`driftmill batch` says what it did, and `problem` is spoken of."""
    from typer.testing import CliRunner

    from driftmill import rollout
    from driftmill.cli import app

    rollout.change(store, "tiny", champion=make_bundle().version, by="test", reason="first")
    rows = write(tmp_path / "in.parquet", tiny_frame(30).assign(amount=[2000.0] + [5.0] * 29))
    monkeypatch.setenv("DRIFTMILL_STORE", store.uri)
    command = ["--home", str(tmp_path), "batch", "tiny", "-i", str(rows), "-o"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "30 rows in 1 files" in done.output
    assert "1 rows have no prediction" in done.output
    as_json = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--json"])
    assert json.loads(as_json.stdout)["kept"] == 1
