"""The check of a running service, against real ones."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from driftmill import rollout
from driftmill.serving.access import RIGHTS
from driftmill.serving.log import labelled, read, segments
from driftmill.store import Store
from services import check
from tests.services.test_tabular import MODULE, MakeBundle, service
from tests.services.test_vision import MODULE as VISION
from tests.services.test_vision import promote
from tests.serving.pictures import put_bundle


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = check.main([*arguments, "--timeout", "3"])
    return code, capsys.readouterr().out.splitlines()


def test_a_service_that_works_passes(
    store: Store, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it sends is marked in the log, and its label belongs to no row."""
    version = make_bundle().version
    rollout.change(store, "tiny", champion=version, by="test", reason="first")
    with service(store, tmp_path) as (_, url), socket.create_server(("127.0.0.1", 0)) as open_:
        shut = "127.0.0.1:9"
        code, lines = run(capsys, url, "--closed", shut)
        assert code == 0
        (said, closed) = lines
        assert re.match(f"ok      service: tiny {version} predicts '(yes|no)', ", said)
        assert said.endswith("takes feedback, counts it")
        assert closed == f"ok      closed: {shut} cannot be reached"
        host, port = open_.getsockname()
        code, lines = run(capsys, url, "--closed", f"{host}:{port}")
        assert code == 1
        assert lines[1].startswith(f"FAILED  closed: {host}:{port} can be reached, and must not be")
    rows = read(store, segments(store, "tiny", "predictions"))
    assert list(rows["_id"]) == ["driftmill-check"] * 2
    assert labelled(store, "tiny").empty


def test_a_service_with_tokens_gets_them_and_must_ask_for_them(
    store: Store, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout.change(store, "tiny", champion=make_bundle().version, by="test", reason="first")
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for right in RIGHTS:
        (tokens / right).write_text(f"{right}-of-yesterday\n{right}-of-today-0123\n")
    with service(store, tmp_path, [*MODULE[:-1], "--tokens", str(tokens), MODULE[-1]]) as (_, url):
        code, (said,) = run(capsys, url, "--tokens", str(tokens))
        assert code == 0, said
        assert said.endswith("turns away who has no token")
        assert run(capsys, url)[1][0].startswith(f"FAILED  service: {url}/model answers 401")
    with service(store, tmp_path) as (_, url):
        code, (said,) = run(capsys, url, "--tokens", str(tokens))
        assert code == 1
        assert "POST /predict without a token answers" in said


def test_a_model_of_images_is_asked_with_an_image(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(store, put_bundle(store, tmp_path))
    with service(store, tmp_path, VISION, model="shades") as (_, url):
        code, lines = run(capsys, url)
    assert (code, len(lines)) == (0, 1), lines


def test_what_does_not_answer_or_is_no_address_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,) = run(capsys, "http://127.0.0.1:9")
    assert code == 1
    assert line.startswith("FAILED  service: http://127.0.0.1:9 does not answer")
    assert run(capsys, "127.0.0.1:9") == (
        1,
        ["FAILED  service: 127.0.0.1:9 is no http:// address"],
    )
    code, lines = run(capsys, "http://127.0.0.1:9", "--closed", "no.such.host.invalid:1")
    assert lines[1].startswith("FAILED  closed: no.such.host.invalid:1 is no address")
