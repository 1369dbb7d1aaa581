"""The digest of the code: another one as soon as any file of the package is another."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from driftmill import version


def digest(package: Path) -> str:
    """The digest that the code of a package's folder gives itself."""
    spec = importlib.util.spec_from_file_location("copied", package / "version.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: str = module.code_digest()
    return found


def test_it_goes_by_names_and_contents_of_the_package_wherever_it_lies(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "inner").mkdir(parents=True)
        shutil.copy(Path(version.__file__), folder / "version.py")
        (folder / "inner" / "fit.py").write_text("SEED = 0\n")
    assert digest(one) == digest(two)
    before = digest(one)
    (one / "inner" / "notes.txt").write_text("not code")
    assert digest(one) == before
    (one / "inner" / "fit.py").write_text("SEED = 1\n")
    (two / "inner" / "fit.py").rename(two / "inner" / "train.py")
    assert len({before, digest(one), digest(two)}) == 3


def test_it_is_worked_out_once() -> None:
    assert version.code_digest() is version.code_digest()
    assert len(version.code_digest()) == 64
