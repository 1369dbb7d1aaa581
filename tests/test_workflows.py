"""The workflows of GitHub, the example for GitLab, and the example of GitOps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import compile as compiler

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
GITLAB = ROOT / "examples" / "gitlab" / ".gitlab-ci.yml"
GITOPS = ROOT / "examples" / "gitops"
each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but for `on`, which is a key here and no boolean."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(path.read_text(), _Loader)
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in read(path)["jobs"].values():
        yield from job["steps"]


def program(name: str) -> str:
    """A program of the environment or the PATH; skips where there is none."""
    here = Path(sys.executable).with_name(name)
    found = str(here) if here.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def made(script: str) -> set[str]:
    """The targets that a shell script makes."""
    found = re.findall(r"\bmake((?: +[a-z][a-z-]*)+)", script)
    return {word for words in found for word in words.split()}


def test_there_are_all_five() -> None:
    assert [p.stem for p in WORKFLOWS] == ["contracts", "images", "nightly", "test", "train"]


@each
def test_actions_are_pinned_by_commit_with_their_version(path: Path) -> None:
    lines = re.findall(r"uses: *(.+)", path.read_text())
    assert len(lines) == sum("uses" in step for step in steps(path)) > 0
    for line in lines:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_version_everywhere() -> None:
    versions: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for action, pin in re.findall(r"uses: *([^@\s]+)@(.+)", path.read_text()):
            versions.setdefault(action, set()).add(pin)
    assert {action: pins for action, pins in versions.items() if len(pins) > 1} == {}


@each
def test_jobs_get_no_right_but_what_they_name(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"], name
        written = {right for right, what in job["permissions"].items() if what == "write"}
        assert written <= {
            ("images", "release"): {"packages", "id-token"},
            ("contracts", "comment"): {"pull-requests"},
            ("train", "train"): {"id-token"},
        }.get((path.stem, name), set())


def test_the_job_that_comments_runs_no_code_of_the_request() -> None:
    comment = read(ROOT / ".github/workflows/contracts.yaml")["jobs"]["comment"]
    assert not any("checkout" in step.get("uses", "") for step in comment["steps"])
    assert not any(made(step.get("run", "")) for step in comment["steps"])


@each
def test_no_token_stays_on_the_disk_and_no_job_runs_for_ever(path: Path) -> None:
    workflow = read(path)
    assert "pull_request_target" not in workflow["on"]
    assert "workflow_run" not in workflow["on"]
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 360
    for step in steps(path):
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@each
def test_nothing_is_pasted_into_a_script(path: Path) -> None:
    for step in steps(path):
        assert "${{" not in step.get("run", "")


@each
def test_they_call_what_people_call(path: Path) -> None:
    called = {target for step in steps(path) for target in made(step.get("run", ""))}
    assert called
    assert called - targets() == set()


def test_gitlab_calls_the_same_targets() -> None:
    jobs = [job for job in yaml.safe_load(GITLAB.read_text()).values() if isinstance(job, dict)]
    called = {t for job in jobs for line in job.get("script", []) for t in made(line)}
    ours = {t for path in WORKFLOWS for step in steps(path) for t in made(step.get("run", ""))}
    assert called == ours


def test_zizmor_finds_nothing() -> None:
    command = [program("zizmor"), "--offline", "--persona", "auditor", str(WORKFLOWS[0].parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_nothing() -> None:
    command = [program("actionlint"), *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cosign_signs_what_lies_in_dist(tmp_path: Path) -> None:
    """By a key of one's own, with no service; of a file that was changed it says so."""
    cosign = program("cosign")
    packed = tmp_path / "dist" / "tiny-0123456789ab.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(b"a bundle")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COSIGN_PASSWORD": ""}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert run(cosign, "generate-key-pair").returncode == 0
    makefile = str(ROOT / "Makefile")
    done = run("make", "-f", makefile, "sign-bundle", "COSIGN_KEY=cosign.key")
    assert done.returncode == 0, done.stdout + done.stderr
    check = [cosign, "verify-blob", "--key", "cosign.pub", "--insecure-ignore-tlog=true"]
    check += ["--bundle", f"{packed}.sigstore.json", str(packed)]
    assert run(*check).returncode == 0
    packed.write_bytes(b"another one")
    changed = run(*check)
    assert changed.returncode != 0
    assert "invalid signature" in changed.stderr
    packed.unlink()
    nothing = run("make", "-f", makefile, "sign-bundle", "COSIGN_KEY=cosign.key")
    assert nothing.returncode != 0
    assert "There is nothing in dist/" in nothing.stdout


@pytest.mark.parametrize(
    ("schema", "files"),
    [("gitlab-ci", [GITLAB]), ("github-workflows", WORKFLOWS)],
    ids=["gitlab", "github"],
)
def test_the_published_schemas_hold(schema: str, files: list[Path]) -> None:
    command = [program("check-jsonschema"), "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> tuple[Path, str]:
    """A repository with two contracts, of which the last commit changed one; and the commit
    before."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    for name in ("bikes", "payments"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "contract.yaml").write_text("model: a\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "two")
    before = git("rev-parse", "HEAD")
    (tmp_path / "models/payments/contract.yaml").write_text("model: b\n")
    git("commit", "--quiet", "-a", "-m", "one changes")
    return tmp_path, before


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        ({"GITHUB_EVENT_NAME": "push"}, ["models/payments/contract.yaml"]),
        (
            {"GITHUB_EVENT_NAME": "push", "BEFORE": "0" * 40},
            ["models/bikes/contract.yaml", "models/payments/contract.yaml"],
        ),
        (
            {"GITHUB_EVENT_NAME": "workflow_dispatch", "INPUT": "models/bikes/contract.yaml"},
            ["models/bikes/contract.yaml"],
        ),
        (
            {"GITHUB_EVENT_NAME": "schedule", "NIGHTLY": '["models/bikes/contract.yaml"]'},
            ["models/bikes/contract.yaml"],
        ),
        ({"GITHUB_EVENT_NAME": "workflow_dispatch", "INPUT": "$(shell id)"}, None),
        ({"GITHUB_EVENT_NAME": "workflow_dispatch", "INPUT": "../other/contract.yaml"}, None),
        ({"GITHUB_EVENT_NAME": "workflow_dispatch", "INPUT": "models/none/contract.yaml"}, None),
    ],
    ids=["push", "first-push", "by-hand", "nightly", "shell", "outside", "unknown"],
)
def test_the_contracts_to_train_are_chosen_by_the_event(
    clone: tuple[Path, str], event: dict[str, str], wanted: list[str] | None
) -> None:
    program("jq")
    folder, before = clone
    choose = read(ROOT / ".github/workflows/train.yaml")["jobs"]["choose"]["steps"][-1]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()
    output = folder / "output"
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "GITHUB_SHA": head,
        "GITHUB_OUTPUT": str(output),
        "BEFORE": before,
        **event,
    }
    # As GitHub runs a step.
    done = subprocess.run(
        ["bash", "-e", "-c", choose["run"]], cwd=folder, env=environment, capture_output=True
    )
    if wanted is None:
        assert done.returncode != 0
        assert not output.exists()
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text().removeprefix("contracts=")) == wanted


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of GitOps, with the payments contract compiled into it."""
    folder = tmp_path_factory.mktemp("gitops") / "gitops"
    shutil.copytree(GITOPS, folder)
    arguments = [str(ROOT / "examples/payments/contract.yaml"), "--store", "s3://models/driftmill"]
    assert compiler.main([*arguments, "-o", str(folder / "payments/compiled")]) == 0
    return folder


def rendered(folder: Path, *names: str) -> str:
    command = [program("helm"), "template", "payments", str(ROOT / "helm/driftmill")]
    command += ["--namespace", "payments"]
    for name in names:
        command += ["--values", str(folder / name)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_argo_renders_the_same_each_time(delivered: Path) -> None:
    application = yaml.safe_load((delivered / "argocd/application.yaml").read_text())
    chart, models = application["spec"]["sources"]
    assert (ROOT / chart["path"] / "Chart.yaml").is_file()
    names = [name.removeprefix(f"${models['ref']}/") for name in chart["helm"]["valueFiles"]]
    assert rendered(delivered, *names) == rendered(delivered, *names)
    # Without what is written by hand the token would be another one each time.
    assert rendered(delivered, *names[:1]) != rendered(delivered, *names[:1])


def test_flux_gives_helm_the_same_files(delivered: Path) -> None:
    done = subprocess.run(
        [program("kubectl"), "kustomize", str(delivered / "payments")],
        check=True,
        capture_output=True,
        text=True,
    )
    values, release = yaml.safe_load_all(done.stdout)
    assert values["metadata"]["name"] != "payments-values", "no digest in the name"
    for source in release["spec"]["valuesFrom"]:
        assert source["name"] == values["metadata"]["name"]
    files = [values["data"][source["valuesKey"]] for source in release["spec"]["valuesFrom"]]
    assert files == [
        (delivered / "payments" / name).read_text()
        for name in ("compiled/values.yaml", "production.yaml")
    ]
    objects = list(yaml.safe_load_all((delivered / "flux/payments.yaml").read_text()))
    named = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    source = release["spec"]["chart"]["spec"]["sourceRef"]
    assert (source["kind"], source["name"]) in named
    assert (ROOT / release["spec"]["chart"]["spec"]["chart"] / "Chart.yaml").is_file()
    assert (delivered / objects[-1]["spec"]["path"] / "kustomization.yaml").is_file()
