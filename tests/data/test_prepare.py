"""The prepare step on real files and a real inference log."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driftmill import contract
from driftmill.contract import Contract
from driftmill.data import prepare, sources
from driftmill.data.schema import DataError, QuarantineError
from driftmill.features import ID, TIME
from driftmill.store import Store
from tests.conftest import tiny_frame

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = """
apiVersion: driftmill/v1
model: tiny
task: classification
data:
  source: file:rows.csv
  target: {name: fraud, labels: ["no", "yes"]}
  id: order
  time: {columns: [at], until: 2026-01-05T00:00:00Z}
  columns:
    - {name: amount, type: float, min: 0, max: 1000}
    - {name: age, type: int, nullable: true}
    - {name: channel, type: category, categories: [web, app]}
  quarantine: {max_fraction: 0.1}
"""
FILES = [
    "dataset.json",
    "profile.html",
    "profile.json",
    "quarantine.parquet",
    "test.parquet",
    "train.parquet",
]


def history(rows: int = 120) -> pd.DataFrame:
    """Hourly rows from the first of January: 96 of them before `until`."""
    return tiny_frame(rows).assign(
        order=[f"o{i}" for i in range(rows)],
        at=pd.date_range("2026-01-01", periods=rows, freq="h", tz="UTC"),
    )


def write(folder: Path, frame: pd.DataFrame, text: str = TEXT) -> Contract:
    frame.to_csv(folder / "rows.csv", index=False)
    (folder / "contract.yaml").write_text(text)
    return contract.load(folder / "contract.yaml")


def write_log(
    store: Store, frame: pd.DataFrame, labels: dict[str, str], at: datetime, name: str = "w-1"
) -> None:
    """Segments of the inference log; each row of `frame` may give `_id`, `_time` and `_role`."""
    n = len(frame)
    ids = [f"{name}-{i}" for i in range(n)]
    rows = frame[["amount", "age", "channel"]].assign(
        _prediction_id=ids,
        _request_id="r",
        _at=[pd.Timestamp(at) + pd.Timedelta(seconds=i) for i in range(n)],
        _id=frame.get(ID, pd.Series([None] * n, dtype=object)),
        _time=frame.get(TIME, pd.Series([None] * n, dtype="datetime64[us, UTC]")),
        _version="0" * 12,
        _role=frame.get("_role", "champion"),
        _prediction="no",
        _score=0.1,
    )
    answers = pd.DataFrame(
        {
            "_prediction_id": list(labels),
            "_at": pd.Timestamp(at),
            "_label": list(labels.values()),
        }
    )
    for kind, table in (("predictions", rows), ("labels", answers)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), sink)
        key = f"tiny/log/{kind}/{at:%Y%m%d}/{at:%H%M%S%f}-{name}.parquet"
        store.write(key, sink.getvalue().to_pybytes())


def accounted(info: prepare.DatasetInfo) -> bool:
    parts = (info.rows, info.quarantined, info.replaced_rows, info.held_out_rows, info.older_rows)
    return info.read_rows == sum(parts) + info.imageless_rows


def test_history_becomes_training_and_test_rows(tmp_path: Path) -> None:
    of = write(tmp_path, history())
    info = prepare.prepare(of, tmp_path / "out")
    found = prepare.read(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert found.info == info
    assert (info.read_rows, info.rows, info.train_rows, info.test_rows) == (96, 96, 77, 19)
    assert (info.history_rows, info.logged_rows, info.quarantined) == (96, 0, 0)
    assert info.from_time == datetime(2026, 1, 1, tzinfo=UTC)
    assert info.to_time == datetime(2026, 1, 4, 23, tzinfo=UTC)
    assert info.test_from_time == found.test[TIME].iloc[0]
    assert info.log_until is None
    assert list(found.train) == ["amount", "age", "channel", "fraud", ID, TIME]
    assert str(found.train[TIME].dtype) == "datetime64[ns, UTC]"
    assert found.train[ID].tolist() == [f"o{i}" for i in range(77)]


def test_the_same_rows_give_the_same_fingerprints(tmp_path: Path) -> None:
    for name, frame in (("a", history()), ("b", history().sample(frac=1, random_state=1))):
        (tmp_path / name).mkdir()
        prepare.prepare(write(tmp_path / name, frame), tmp_path / name / "out")
    one, two = (prepare.read(tmp_path / name / "out").info for name in "ab")
    assert one.fingerprint == two.fingerprint
    assert one.test_fingerprint == two.test_fingerprint
    assert one.source_sha256 != two.source_sha256


def test_bad_rows_are_kept_with_their_reasons(tmp_path: Path) -> None:
    frame = history().astype({"amount": object})
    frame.loc[3, "amount"] = "much"
    frame.loc[5, "amount"] = -1
    frame.loc[5, "fraud"] = "perhaps"
    frame.loc[110, "amount"] = "a row of the stream"
    of = write(tmp_path, frame)
    info = prepare.prepare(of, tmp_path / "out")
    kept = pd.read_parquet(tmp_path / "out" / "quarantine.parquet")
    assert info.quarantined == 2
    assert info.reasons == {
        "amount: not a number": 1,
        "amount: below min 0": 1,
        "fraud: not one of the labels": 1,
    }
    assert kept["order"].tolist() == ["o3", "o5"]
    assert kept["amount"].tolist() == ["much", "-1"]
    assert kept["_reason"].tolist()[1] == "amount: below min 0; fraud: not one of the labels"
    assert kept["_origin"].tolist() == ["history"] * 2
    assert accounted(info)


def test_too_many_bad_rows_stop_the_run_and_are_written_first(tmp_path: Path) -> None:
    frame = history().astype({"amount": object, "at": str})
    frame.loc[:7, "amount"] = "much"
    frame.loc[8:9, "at"] = "some day"
    of = write(tmp_path, frame)
    with pytest.raises(QuarantineError, match=r"10 of 96 rows .*quarantine\.parquet") as error:
        prepare.prepare(of, tmp_path / "out")
    assert error.value.reasons == {
        "amount: not a number": 8,
        "time: missing or cannot be parsed": 2,
    }
    assert len(pd.read_parquet(tmp_path / "out" / "quarantine.parquet")) == 10
    with pytest.raises(DataError, match="no prepared data"):
        prepare.read(tmp_path / "out")


def test_labelled_rows_of_the_log_are_learnt_from(tmp_path: Path, store: Store) -> None:
    of = write(tmp_path, history())
    stream = sources.stream(of)
    assert len(stream) == 24
    labels = {f"w-1-{i}": label for i, label in enumerate(stream["fraud"]) if i != 4}
    stream["_role"] = np.where(np.arange(24) == 6, "shadow", "champion")
    write_log(store, stream, labels, datetime(2026, 2, 1, tzinfo=UTC))
    info = prepare.prepare(of, tmp_path / "out", store)
    found = prepare.read(tmp_path / "out")
    assert (info.history_rows, info.logged_rows, info.rows) == (96, 22, 118)
    assert info.log_until == datetime(2026, 2, 1, 0, 0, 23, tzinfo=UTC)
    assert accounted(info)
    both = pd.concat([found.train, found.test], ignore_index=True)
    assert both[TIME].is_monotonic_increasing
    expected = stream.drop(index=[4, 6], columns="_role").reset_index(drop=True)
    pd.testing.assert_frame_equal(both.tail(22).reset_index(drop=True), expected)


def test_the_newest_of_two_rows_with_one_id_wins(tmp_path: Path, store: Store) -> None:
    of = write(tmp_path, history())
    marks: dict[str, Any] = {ID: "o3", TIME: pd.Timestamp("2026-01-01T03:00Z")}
    row = tiny_frame(1).assign(**marks)
    for day in (1, 2):
        at = datetime(2026, 2, day, tzinfo=UTC)
        write_log(store, row.assign(amount=100.0 * day), {f"w{day}-0": "yes"}, at, f"w{day}")
    info = prepare.prepare(of, tmp_path / "out", store)
    train = prepare.read(tmp_path / "out").train
    assert train.loc[train[ID] == "o3", "amount"].tolist() == [200.0]
    assert (info.replaced_rows, info.history_rows, info.logged_rows) == (2, 95, 1)
    assert accounted(info)


def test_a_request_without_id_and_time_gets_those_of_its_prediction(
    tmp_path: Path, store: Store
) -> None:
    of = write(tmp_path, history())
    at = datetime(2026, 2, 1, tzinfo=UTC)
    write_log(store, tiny_frame(2), {"w-1-0": "yes", "w-1-1": "maybe"}, at)
    info = prepare.prepare(of, tmp_path / "out", store)
    last = prepare.read(tmp_path / "out").test.iloc[-1]
    assert (last[ID], last[TIME]) == ("w-1-0", at)
    assert info.reasons == {"fraud: not one of the labels": 1}
    assert accounted(info)


def test_only_the_newest_rows_are_learnt_from(tmp_path: Path) -> None:
    of = write(tmp_path, history(), TEXT + "train: {rows: 50}\n")
    info = prepare.prepare(of, tmp_path / "out")
    assert (info.rows, info.older_rows, info.read_rows) == (50, 46, 96)
    assert prepare.read(tmp_path / "out").train[ID].iloc[0] == "o46"


def test_a_fixed_test_set_is_never_learnt_from(tmp_path: Path, store: Store) -> None:
    tiny_frame(30, seed=9).to_parquet(tmp_path / "fixed.parquet")
    text = (
        TEXT.replace("  id: order\n", "")
        .replace("  time: {columns: [at], until: 2026-01-05T00:00:00Z}\n", "")
        .replace("  target:", "  test: file:fixed.parquet\n  target:")
    )
    of = write(tmp_path, history(), text)
    stream = sources.stream(of)
    assert len(stream) == 30
    labels = {f"w-1-{i}": label for i, label in enumerate(stream["fraud"])}
    write_log(store, stream, labels, datetime(2026, 2, 1, tzinfo=UTC))
    info = prepare.prepare(of, tmp_path / "out", store)
    found = prepare.read(tmp_path / "out")
    assert (info.train_rows, info.test_rows, info.held_out_rows) == (120, 30, 30)
    assert not set(found.train[ID]) & set(found.test[ID])
    assert TIME not in found.train
    assert info.log_until is None
    assert accounted(info)


def test_data_that_no_model_can_learn_from(tmp_path: Path) -> None:
    of = write(tmp_path, history().assign(fraud="no"))
    with pytest.raises(DataError, match="same label 'no'"):
        prepare.prepare(of, tmp_path / "out")
    of = write(tmp_path, history().tail(20))
    with pytest.raises(DataError, match="no rows before"):
        prepare.prepare(of, tmp_path / "out")


def test_the_adult_example(data_folder: Path, tmp_path: Path) -> None:
    of = contract.load(EXAMPLES / "adult/contract.yaml")
    info = prepare.prepare(of, tmp_path)
    assert (info.train_rows, info.test_rows, info.quarantined) == (32561, 16281, 0)
    test = prepare.read(tmp_path).test
    assert test["income"].value_counts().to_dict() == {"<=50K": 12435, ">50K": 3846}


def test_the_bike_example(data_folder: Path, tmp_path: Path) -> None:
    of = contract.load(EXAMPLES / "bike-sharing/contract.yaml")
    info = prepare.prepare(of, tmp_path)
    stream = sources.stream(of)
    assert (info.rows, info.quarantined, len(stream)) == (4250, 0, 13129)
    assert stream[TIME].iloc[0] == pd.Timestamp("2011-07-01", tz="UTC")


def test_the_payments_example(tmp_path: Path) -> None:
    of = contract.load(EXAMPLES / "payments/contract.yaml")
    info = prepare.prepare(of, tmp_path)
    stream = sources.stream(of)
    assert (info.read_rows, info.rows, info.quarantined) == (4000, 3000, 0)
    assert len(stream) == 12000
    assert prepare.read(tmp_path).train["channel"].isin(["web", "app", "store"]).all()
    assert cast(int, (stream["channel"] == "wallet").idxmax()) >= 2000
