"""Names and contents of the images; what needs no Docker."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from driftmill import images
from driftmill.images import IMAGES, Image, ImageError, Unreachable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the files of all images, and of some others."""
    root = tmp_path / "clone"
    paths = {path for image in IMAGES.values() for path in images.files(image, ROOT)}
    for path in [*paths, "README.md", "Makefile", "tests/conftest.py", "docs/cli.md"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, root / path)
    return root


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program `docker` that stands in for Docker's client; it fails with what a file says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "docker"
    program.write_text(
        f"""#!/bin/sh
[ "$1 $2" = "buildx version" ] && exit 0
case "$1 $2" in "image inspect") echo "Error: No such image: x" >&2; exit 1;; esac
cat {tmp_path}/says >&2
exit 1
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    images._client.cache_clear()
    yield tmp_path / "says"
    images._client.cache_clear()


def digests(root: Path) -> dict[str, str]:
    return {name: images.digest(image, root) for name, image in IMAGES.items()}


def append(path: Path, text: str = "\n# one more line\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def changed(before: dict[str, str], root: Path) -> set[str]:
    return {name for name, digest in digests(root).items() if digest != before[name]}


def test_a_name_has_prefix_version_and_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIFTMILL_IMAGE_PREFIX", raising=False)
    name = images.reference("python-tabular")
    assert re.fullmatch(r"driftmill/python-tabular:\d+\.\d+\.\d+\S*-[0-9a-f]{12}", name)
    monkeypatch.setenv("DRIFTMILL_IMAGE_PREFIX", "registry.example.com:5000/team/")
    there = images.reference("python-tabular")
    assert there == name.replace("driftmill/", "registry.example.com:5000/team/", 1)


def test_without_sources_the_tag_is_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "sources", lambda: None)
    monkeypatch.setattr(images, "tag", images.tag.__wrapped__)
    assert "-" not in images.reference("monitor").rpartition(":")[2]
    with pytest.raises(ImageError, match="clone"):
        images.build("monitor")


def test_code_changes_the_digest_of_the_images_that_hold_it(clone: Path) -> None:
    before = digests(clone)
    append(clone / "driftmill" / "steps.py")
    assert changed(before, clone) == set(IMAGES)
    before = digests(clone)
    append(clone / "services" / "monitor.py")
    assert changed(before, clone) == {"service-tabular", "service-vision", "monitor", "controller"}
    before = digests(clone)
    append(clone / "components" / "Dockerfile")
    steps = {"python-tabular", "python-vision", "python-vision-cuda"}
    assert changed(before, clone) == steps
    before = digests(clone)
    append(clone / "pipelines" / "training.py")
    assert changed(before, clone) == {*steps, "controller"}
    before = digests(clone)
    append(clone / "k8s" / "explain.py")
    assert changed(before, clone) == {"controller"}
    before = digests(clone)
    append(clone / "driftmill" / "new" / "report.html.j2")
    assert changed(before, clone) == set(IMAGES)


def test_locked_versions_change_every_digest(clone: Path) -> None:
    before = digests(clone)
    append(clone / "constraints.txt")
    assert changed(before, clone) == set(IMAGES)


def test_tests_documents_and_compiled_code_change_no_digest(clone: Path) -> None:
    before = digests(clone)
    append(clone / "tests" / "conftest.py")
    append(clone / "README.md")
    append(clone / "docs" / "cli.md")
    append(clone / "Makefile")
    append(clone / "driftmill" / "__pycache__" / "steps.cpython-311.pyc")
    append(clone / "driftmill" / ".env")
    append(clone / "driftmill" / "secrets.yaml")
    assert changed(before, clone) == set()


def test_images_of_the_same_files_differ_by_their_arguments() -> None:
    assert len(set(digests(ROOT).values())) == len(IMAGES)


@pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))
def test_the_dockerfile_takes_the_files_that_the_digest_is_over(image: Image) -> None:
    """What a stage copies from outside is in the digest, and nothing else is."""
    copied = set()
    for line in (ROOT / image.dockerfile).read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            copied |= set(line.split()[1:-1])
    listed = {*image.packages, "LICENSE", "components/slim.py", "constraints.txt", "pyproject.toml"}
    assert listed <= copied
    if image.name in ("controller", "python-tabular"):  # the one that takes all
        assert listed == copied


@pytest.mark.parametrize("dockerfile", ["components/Dockerfile", "services/Dockerfile"])
def test_the_base_is_pinned_by_digest_and_the_user_is_a_number(dockerfile: str) -> None:
    text = (ROOT / dockerfile).read_text()
    assert re.search(r"^ARG BASE=python:3\.11-slim@sha256:[0-9a-f]{64}$", text, re.M)
    assert "USER 65532:65532" in text
    assert "# syntax" not in text


def test_both_dockerfiles_begin_alike() -> None:
    """So that all images share their lowest layer, and the build its first steps."""
    heads = [
        (ROOT / name / "Dockerfile").read_text().partition("FROM")[2].partition("COPY pyproject")[0]
        for name in ("components", "services")
    ]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (None, [name for name in IMAGES if name != "python-vision-cuda"]),
        (["tabular"], ["python-tabular", "service-tabular"]),
        (["vision"], ["python-vision", "service-vision"]),
        (["monitor", "python-vision-cuda", "monitor"], ["monitor", "python-vision-cuda"]),
    ],
)
def test_families_and_names_choose(words: list[str] | None, names: list[str]) -> None:
    assert images.choose(words) == names


def test_an_unknown_image_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main(["build", "--family", "tabluar"]) == 2
    error = capsys.readouterr().err
    assert "no image tabluar" in error
    assert "python-tabular" in error


@pytest.mark.parametrize(
    ("says", "kind", "expected"),
    [
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?",
         ImageError, "start it"),
        ("permission denied while trying to connect to unix:///var/run/docker.sock",
         ImageError, "group docker"),
        ("write /var/lib/docker/x: no space left on device", ImageError, "disk is full"),
        ("ERROR: failed to resolve source metadata for docker.io/library/python: no such host",
         Unreachable, "--base"),
        ("pull access denied for x, repository does not exist", Unreachable, "--base"),
        ("error: Failed to fetch: `https://index.example.com/whl/cpu/torch/`",
         Unreachable, "python-vision-cuda"),
        ("error: Failed to fetch: `https://index.example.com/np/`", Unreachable, "--network host"),
        ("process \"/bin/sh -c false\" did not complete successfully: exit code: 1",
         ImageError, "says why"),
    ],
)  # fmt: skip
def test_a_failed_build_is_one_sentence_with_a_next_step(
    client: Path, says: str, kind: type[ImageError], expected: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client.write_text(says)
    with pytest.raises(kind, match=expected):
        images.build("monitor", log=tmp_path / "log")
    capsys.readouterr()
    assert images.main(["build", "--family", "monitor"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "building monitor"
    assert len(error) == 2
    assert error[1].startswith("driftmill images: monitor: ")


def test_a_refused_push_says_how_to_log_in(client: Path) -> None:
    client.write_text("denied: requested access to the resource is denied")
    with pytest.raises(Unreachable, match="docker login"):
        images.push("registry.example.com/monitor:1")


def test_no_docker_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    images._client.cache_clear()
    try:
        assert images.main(["list"]) == 1
    finally:
        images._client.cache_clear()
    assert capsys.readouterr().err.startswith("driftmill images: docker is not installed")


def test_labels_come_from_the_last_commit_of_the_files(clone: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(clone), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    image = IMAGES["monitor"]
    assert set(images._provenance(image, clone)) == {"VERSION"}
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    first = git("rev-parse", "HEAD")
    append(clone / "README.md")
    git("commit", "--quiet", "--all", "--message", "two")
    assert images._provenance(image, clone)["REVISION"] == first
    append(clone / "driftmill" / "cli.py")
    assert images._provenance(image, clone)["REVISION"] == f"{first}-dirty"
    git("remote", "add", "origin", "https://name:secret@example.com/x.git")
    assert images._provenance(image, clone)["SOURCE"] == ""
