"""A bundle that was changed, cut short, or made for something else is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driftmill import bundle, features
from driftmill.bundle import BundleError, Manifest
from driftmill.contract import Contract
from driftmill.features import EMBEDDING, IMAGE
from driftmill.store import Store, sha256
from driftmill.vision import images
from tests.conftest import logistic_onnx, tiny_frame
from tests.evaluate import pictures

Make = Callable[..., Manifest]


@pytest.fixture
def folder(make_bundle: Make, store: Store) -> Path:
    """A valid bundle."""
    manifest = make_bundle()
    assert store.folder is not None
    return store.folder / bundle.key("tiny", manifest.version)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], digests: bool = True) -> None:
    """Forge the manifest; with `digests` it then fits the files, as a careful forger would do."""
    path = folder / bundle.MANIFEST
    values = json.loads(path.read_text())
    if digests:
        values["files"] = {p.name: sha256(p) for p in folder.iterdir() if p.name != path.name}
        values["version"] = bundle._version(values["files"])
    change(values)
    path.write_text(json.dumps(values))


def keep(values: dict[str, Any]) -> None:
    """No further change."""


def test_a_bundle_loads_and_predicts(folder: Path) -> None:
    loaded = bundle.load(folder, "tiny")
    output = loaded.predict(tiny_frame(20))
    assert output.shape == (20, 2)
    assert output.sum(axis=1) == pytest.approx(1)
    assert loaded.version == folder.name
    assert loaded.manifest.contract.model == "tiny"


def test_the_reference_carries_the_answers_of_the_model(folder: Path) -> None:
    loaded = bundle.load(folder)
    output = loaded.predict(loaded.reference)
    assert loaded.reference["_score"].to_numpy() == pytest.approx(output[:, 1])
    assert set(loaded.reference["_prediction"]) == {"no", "yes"}


@pytest.mark.parametrize("name", bundle.CORE)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "more"])
def test_a_changed_file_is_refused(folder: Path, name: str, damage: str) -> None:
    content = bytearray((folder / name).read_bytes())
    middle = len(content) // 2
    if damage == "flip":
        content[middle] ^= 1
    elif damage == "cut":
        del content[middle:]
    elif damage == "empty":
        content.clear()
    else:
        content += b"\n"
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is not the file .*sha256"):
        bundle.load(folder)


@pytest.mark.parametrize("name", bundle.CORE)
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        bundle.load(folder)


def test_a_file_that_the_manifest_does_not_name_is_refused(folder: Path) -> None:
    (folder / "hook.py").write_text("print('never run')")
    with pytest.raises(BundleError, match=r"hook\.py is not in the manifest"):
        bundle.load(folder)


def test_a_folder_is_refused_too(folder: Path) -> None:
    (folder / "more").mkdir()
    with pytest.raises(BundleError, match="more is not in the manifest"):
        bundle.load(folder)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle.load(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle.load(tmp_path / "nowhere")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_manifest_cut_anywhere_is_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / bundle.MANIFEST
    content = path.read_bytes()
    length = data.draw(st.integers(0, len(content.rstrip()) - 1))
    try:
        path.write_bytes(content[:length])
        with pytest.raises(BundleError, match="is damaged"):
            bundle.load(folder)
    finally:
        path.write_bytes(content)


def test_a_manifest_with_a_key_of_another_format_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values.update(pickle="model.pkl"))
    with pytest.raises(BundleError, match="has pickle, which this Driftmill does not know"):
        bundle.load(folder)


def test_a_contract_that_can_say_more_is_named(folder: Path) -> None:
    """As where training was upgraded before the services were."""
    rewrite(folder, lambda values: values["contract"]["serve"].update(mood="good"))
    with pytest.raises(BundleError, match=r"has contract\.serve\.mood, .* a newer one wrote it"):
        bundle.load(folder)


@pytest.mark.parametrize("number", [0, 2])
def test_a_manifest_of_another_format_number_is_refused(folder: Path, number: int) -> None:
    rewrite(folder, lambda values: values.update(format=number))
    with pytest.raises(BundleError, match=f"format {number}"):
        bundle.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".", ""])
def test_a_name_outside_the_folder_is_refused_before_it_is_read(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.write_text("not of this bundle")
    digest = sha256(outside)
    rewrite(folder, lambda values: values["files"].update({name: digest}))
    with pytest.raises(BundleError, match="is not a plain file name"):
        bundle.load(folder)


def test_a_link_is_refused(folder: Path) -> None:
    """What it points to may change after the check, and lies outside of the bundle."""
    path = folder / "model.onnx"
    moved = folder.parent / "elsewhere.onnx"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(BundleError, match=r"model\.onnx is a link"):
        bundle.load(folder)


def test_a_manifest_that_leaves_out_a_file_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values["files"].pop("examples.json"))
    with pytest.raises(BundleError, match=r"does not name examples\.json"):
        bundle.load(folder)


def test_a_wrong_version_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values.update(version="0" * 12))
    with pytest.raises(BundleError, match="version 000000000000 does not fit"):
        bundle.load(folder)


def test_a_bundle_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="is a bundle of 'tiny', not of 'payments'"):
        bundle.load(folder, "payments")


def test_a_bundle_under_another_name_is_refused(
    folder: Path, store: Store, make_bundle: Make
) -> None:
    other = make_bundle(slope=0.05)
    assert store.folder is not None
    target = store.folder / bundle.key("tiny", "0123456789ab")
    target.parent.mkdir(exist_ok=True)
    (store.folder / bundle.key("tiny", other.version)).rename(target)
    with pytest.raises(BundleError, match=f"holds version {other.version}, not 0123456789ab"):
        bundle.fetch(store, "tiny", "0123456789ab")


def test_a_version_that_is_not_there_is_an_error_of_its_own(store: Store) -> None:
    with pytest.raises(BundleError, match="tiny has no version abc"):
        bundle.fetch(store, "tiny", "abc")


def test_a_file_that_is_no_model_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    rewrite(folder, keep)
    with pytest.raises(BundleError, match="cannot be loaded"):
        bundle.load(folder)


def test_a_foreign_onnx_model_is_refused(folder: Path) -> None:
    node = onnx.helper.make_node("Identity", ["pixels"], ["features"])
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 3])
        for name in ("pixels", "features")
    ]
    graph = onnx.helper.make_graph([node], "foreign", ends[:1], ends[1:])
    onnx.save(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9
        ),
        folder / "model.onnx",
    )
    rewrite(folder, keep)
    with pytest.raises(BundleError, match="not a Driftmill model"):
        bundle.load(folder)


def test_another_model_in_the_same_shape_fails_the_replay(folder: Path) -> None:
    logistic_onnx(folder / "model.onnx", slope=-0.02)
    rewrite(folder, keep)
    with pytest.raises(BundleError, match="does not answer its examples"):
        bundle.load(folder)


def test_a_model_with_fewer_labels_than_the_schema_is_refused(folder: Path) -> None:
    path = folder / "schema.json"
    schema = json.loads(path.read_text())
    path.write_text(json.dumps({**schema, "labels": ["no", "yes", "maybe"]}))
    rewrite(folder, keep)
    with pytest.raises(BundleError, match=r"2 .* 3 labels"):
        bundle.load(folder)


def test_a_schema_that_does_not_fit_the_model_is_refused(folder: Path) -> None:
    path = folder / "schema.json"
    schema = json.loads(path.read_text())
    path.write_text(json.dumps({**schema, "columns": schema["columns"][1:]}))
    rewrite(folder, keep)
    with pytest.raises(BundleError, match=r"examples .* do not fit the schema"):
        bundle.load(folder)


@pytest.mark.parametrize(
    "change", [{"target": "other"}, {"task": "regression", "labels": []}, {"columns": "reversed"}]
)
def test_a_schema_of_another_contract_is_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "schema.json"
    schema = json.loads(path.read_text())
    if change.get("columns"):  # the two numbers change places: the shapes still fit
        first, second, *rest = schema["columns"]
        change = {"columns": [second, first, *rest]}
    path.write_text(json.dumps({**schema, **change}))
    rewrite(folder, keep)
    with pytest.raises(BundleError, match="schema is not that of the contract"):
        bundle.load(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"numeric": [], "categorical": [], "output": []}', '{"output": 1}']
)
def test_examples_that_prove_nothing_are_refused(folder: Path, text: str) -> None:
    (folder / "examples.json").write_text(text)
    rewrite(folder, keep)
    with pytest.raises(BundleError, match="cannot be loaded"):
        bundle.load(folder)


def test_no_file_of_a_bundle_can_run_code(folder: Path) -> None:
    for path in folder.iterdir():
        assert path.suffix in {".json", ".onnx", ".parquet"}
        assert not path.read_bytes().startswith(b"\x80"), "a pickle begins so"


def test_the_same_content_is_the_same_version(make_bundle: Make) -> None:
    assert make_bundle().version == make_bundle().version
    assert make_bundle(slope=0.03).version != make_bundle().version


def test_each_core_file_makes_the_version() -> None:
    files = dict.fromkeys(bundle.CORE, "a")
    versions = {bundle._version(files | {name: "b"}) for name in bundle.CORE}
    assert len(versions | {bundle._version(files)}) == len(bundle.CORE) + 1


def test_a_report_and_metrics_are_added_without_a_new_version(folder: Path) -> None:
    before = bundle.verify(folder)
    after = bundle.add(folder, "report.html", b"<html></html>", {"auc": 0.9})
    assert after.version == before.version
    assert after.created == before.created
    assert after.metrics == {"auc": 0.9}
    assert bundle.load(folder).manifest == after
    (folder / "report.html").write_bytes(b"<html>forged</html>")
    with pytest.raises(BundleError, match=r"report\.html is not the file"):
        bundle.load(folder)


def test_missing_values_survive_in_the_examples(tiny: Contract, tmp_path: Path) -> None:
    frame = tiny_frame(50)
    frame.loc[0, "age"] = np.nan
    frame.loc[1, "channel"] = None
    bundle.write(
        tmp_path / "bundle",
        contract=tiny,
        signature=features.signature(tiny, frame),
        model=logistic_onnx(tmp_path / "m.onnx"),
        reference=frame,
        examples=frame.head(3),
        family="linear",
        params={},
        data={},
    )
    replay = json.loads((tmp_path / "bundle" / "examples.json").read_text())
    assert replay["numeric"][0][1] is None
    assert replay["categorical"][1] == [""]
    assert len(bundle.load(tmp_path / "bundle").reference) == 50


def test_a_version_comes_through_any_store(store: Store, make_bundle: Make, tmp_path: Path) -> None:
    """An object store has no folders: the bundle is copied, then verified."""
    version = make_bundle().version
    remote = Store("memory://bundles")
    assert store.folder is not None
    source = store.folder / bundle.key("tiny", version)
    remote.put_folder(source, bundle.key("tiny", version), bundle.MANIFEST)
    loaded = bundle.fetch(remote, "tiny", version, cache=tmp_path / "cache")
    assert loaded.version == version
    assert loaded.folder.is_relative_to(tmp_path / "cache")


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid bundle of a model of images."""
    of, folder = pictures.make_contract(), tmp_path_factory.mktemp("pictures") / "new"
    return pictures.make_bundle(folder, of, pictures.network(of, "mlp")).folder


def test_a_bundle_of_images_predicts_in_parts(pictures_folder: Path) -> None:
    loaded = bundle.load(pictures_folder, "pictures")
    table = pictures.frame(loaded.manifest.contract, bundle.BATCH_IMAGES + 10, seed=5)
    output = loaded.predict(table)
    whole = loaded.session.run(*features.arrays(table, loaded.signature))
    assert output == pytest.approx(whole, abs=1e-5)
    assert loaded.predict(table) is output  # it is not computed twice
    assert not output.flags.writeable
    assert loaded.predict(table.head(3)) == pytest.approx(whole[:3], abs=1e-5)
    assert loaded.predict(table.head(0)).shape == (0, 3)


def test_the_reference_of_images_keeps_embeddings_and_some_images(
    tmp_path: Path, pictures_folder: Path
) -> None:
    loaded = bundle.load(pictures_folder)
    of = loaded.manifest.contract
    table = pictures.frame(of, bundle.REFERENCE_IMAGES + 50, seed=6)
    bundle.write(
        tmp_path / "bundle",
        contract=of,
        signature=loaded.signature,
        model=pictures_folder / "model.onnx",
        reference=table,
        examples=table.head(4),
        family="mlp",
        params={},
        data={},
    )
    written = bundle.load(tmp_path / "bundle")
    assert written.training is None
    reference = written.reference
    kept = reference[IMAGE].dropna()
    assert len(kept) == bundle.REFERENCE_IMAGES
    for row in (kept.index[0], kept.index[-1]):
        assert (images.from_png(kept[row]) == table[IMAGE][row]).all()
    _, embeddings = written.session.embed(*features.arrays(table, written.signature))
    found = np.stack([np.frombuffer(row, "<f2") for row in reference[EMBEDDING]])
    assert found == pytest.approx(embeddings, rel=1e-2, abs=1e-3)


def test_how_a_network_learnt_comes_along(pictures_folder: Path) -> None:
    loaded = bundle.load(pictures_folder)
    assert loaded.training == pictures.TRAINING
    assert set(loaded.manifest.files) >= {"training.json", "weights.safetensors"}


def test_a_table_has_no_training(folder: Path) -> None:
    assert bundle.load(folder).training is None
    assert bundle.read_manifest(folder).precision == "float32"


@pytest.mark.parametrize(
    ("served", "most"), [(None, 1e-4), ("float32", 1e-4), ("float16", 1e-2), ("int8", 5e-2)]
)
def test_examples_may_differ_by_what_the_precision_brings(
    pictures_folder: Path, tmp_path: Path, served: str | None, most: float
) -> None:
    for part, fits in ((0.5, True), (3.0, False)):
        folder = tmp_path / f"{part}"
        shutil.copytree(pictures_folder, folder)
        path = folder / "examples.json"
        replay = json.loads(path.read_text())
        replay["output"][1][0] += part * most
        path.write_text(json.dumps(replay))
        data = {"precision": {"served": served}} if served else {}
        rewrite(folder, lambda values, data=data: values.update(data=data))  # type: ignore[misc]
        if fits:
            assert bundle.load(folder).manifest.precision == (served or "float32")
        else:
            with pytest.raises(BundleError, match="does not answer its examples"):
                bundle.load(folder)
