from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from k8s import preflight
from k8s.preflight import GIB, Check, Needs, Supported

NEEDS = Needs(cores=2, memory=4 * GIB, disk=GIB, instances=512, watches=524_288)


def test_this_machine_as_it_is() -> None:
    checks = preflight.check(Needs(0, 0, 0, 0, 0), [], git=True)
    assert [c.name for c in checks][:4] == ["docker", "kind", "kubectl", "git"]
    for each in checks:
        assert each.found
        assert (each.state == "wrong") <= bool(each.mend)  # what is wrong can be mended


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("kind v0.30.0 go1.26.8 linux/amd64", (0, 30, 0)),
        ("Docker version 28.2.2, build e6534b4", (28, 2, 2)),
        ("Client Version: v1.32.4-dispatcher\nKustomize Version: v5.5.0", (1, 32, 4)),
        ("git version 2.39.5", (2, 39, 5)),
        ("v3.17", (3, 17)),
        ("no version", None),
    ],
)
def test_versions_are_read(text: str, version: tuple[int, ...] | None) -> None:
    assert preflight.parse(text) == version


def test_supported_versions() -> None:
    some = Supported((2, 17), (2, 18))
    assert (2, 17) in some
    assert (2, 17, 5) in some
    assert (2, 18) not in some
    assert (2, 16, 9) not in some
    assert (99,) in Supported((2, 17))
    assert str(some) == "2.17 or newer, below 2.18"


def test_a_program_that_is_too_old(program: Callable[[str, str], None]) -> None:
    program("kind", "echo kind v0.19.0 go1.20")
    assert preflight.tool("kind") == Check(
        "kind",
        "wrong",
        "0.19.0",
        "install 0.24 or newer: see https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
    )


def test_programs_that_are_missing_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = preflight.check(NEEDS, [], git=True)
    wrong = [c.name for c in checks if c.state == "wrong"]
    assert wrong[:4] == ["docker", "kind", "kubectl", "git"]
    assert preflight.tool("helm", needed=False).state == "warning"


def test_docker_that_does_not_answer(program: Callable[[str, str], None]) -> None:
    program(
        "docker",
        'case $1 in --version) echo Docker version 28.0.0;; *) echo "{}";'
        ' echo "Cannot connect to the Docker daemon at unix:///var/run/docker.sock." >&2; exit 1;;'
        " esac",
    )
    (server,) = (c for c in preflight.check(NEEDS, [], git=False) if c.name == "Docker's server")
    assert server.state == "wrong"
    assert server.mend.startswith("Docker does not answer: start it")


def info(**changes: object) -> dict[str, object]:
    here = {"NCPU": 4, "MemTotal": 16 * GIB, "DockerRootDir": "/", "Name": socket.gethostname()}
    return {**here, **changes}


def test_a_machine_that_is_large_enough() -> None:
    small = Needs(cores=2, memory=1, disk=1, instances=0, watches=0)
    assert {c.state for c in preflight.machine(small, info())} == {"ok"}


def test_a_machine_that_is_too_small() -> None:
    large = Needs(cores=64, memory=2**60, disk=2**60, instances=0, watches=0)
    cores, memory, disk = preflight.machine(large, info())
    assert (cores.state, cores.found, cores.mend) == ("wrong", "4", "give Docker 64 cores")
    assert memory.state == "wrong"
    assert "are needed" in memory.mend
    assert disk.state == "wrong"
    assert "docker system prune" in disk.mend


def test_docker_on_another_machine_says_its_own_memory() -> None:
    _, memory, disk = preflight.machine(NEEDS, info(Name="elsewhere", MemTotal=8 * GIB))
    assert (memory.state, memory.found) == ("ok", "8.0 GiB")
    assert (disk.state, disk.found) == ("ok", "not looked at: Docker runs on another machine")


def test_available_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemFree:  1 kB\nMemAvailable:     7 kB\n")
    assert preflight.available_memory(meminfo) == 7 * 1024
    assert preflight.available_memory(tmp_path / "none") is None


def test_inotify(tmp_path: Path) -> None:
    (tmp_path / "max_user_instances").write_text("128\n")
    (tmp_path / "max_user_watches").write_text("524288\n")
    (check,) = preflight.inotify(NEEDS, tmp_path)
    assert check.state == "wrong"
    assert check.found == "max_user_instances 128, max_user_watches 524288"
    assert check.mend.startswith("`sudo sysctl fs.inotify.max_user_instances=512`")
    assert list(preflight.inotify(NEEDS, tmp_path / "none")) == []


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        check = preflight.port("127.0.0.1", taken)
        assert check.state == "wrong"
        assert "--config a copy of k8s/kind.yaml" in check.mend
    assert preflight.port("127.0.0.1", taken).state == "ok"
    assert preflight.port("192.0.2.1", taken).state == "wrong"  # no address of this machine


def test_the_report_says_below_each_what_to_do() -> None:
    text = preflight.report([Check("kind", "ok", "0.30.0"), Check("git", "wrong", "no", "get it")])
    assert text.splitlines() == [
        "ok      kind  0.30.0",
        "wrong   git   no",
        "              -> get it",
    ]
