"""Who is let in: tokens and their rotation, rights by path, rates."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftmill.serving import access as access_module
from driftmill.serving import rate as rate_module
from driftmill.serving.access import RIGHTS, Access
from driftmill.serving.codec import RequestError
from driftmill.serving.mount import Mount
from driftmill.serving.rate import Rate
from driftmill.serving.server import Server
from driftmill.store import Store
from tests.serving.test_server import not_found

TOKENS: dict[str, str] = {right: f"{right}-token-0123456789" for right in RIGHTS}
PATHS = {
    "predict": ("/predict", "/explain", "/v2", "/v2/models/tiny", "/v2/models/tiny/infer"),
    "feedback": ("/feedback",),
    "metrics": ("/metrics",),
    "admin": ("/model", "/docs.json", "/docs", "/", "/models", "/predict/", "//predict", "/v20"),
}
OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")


def write(folder: Path, **tokens: str) -> Path:
    folder.mkdir(exist_ok=True)
    for right, text in tokens.items():
        (folder / right).write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "tokens", **TOKENS)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Access:
    """For tests that change no file."""
    return Access(write(tmp_path_factory.mktemp("tokens"), **TOKENS))


def scope(path: str, token: str | bytes | None = None, **more: Any) -> dict[str, Any]:
    headers = []
    if token is not None:
        content = token.encode() if isinstance(token, str) else token
        headers = [(b"host", b"x"), (b"authorization", b"Bearer " + content)]
    return {"type": "http", "path": path, "headers": headers, "client": ("10.0.0.1", 1)} | more


def status(access: Access, *args: Any, **more: Any) -> int:
    why = access.check(scope(*args, **more))
    return 200 if why is None else why.status


@pytest.mark.parametrize("right", RIGHTS)
def test_a_token_gives_its_right_and_no_other(folder: Path, right: str) -> None:
    access = Access(folder)
    for other, paths in PATHS.items():
        for path in paths:
            expected = 200 if other == right else 403
            assert status(access, path, TOKENS[right]) == expected, path
            assert status(access, path) == 401, path
    for path in OPEN:
        assert status(access, path) == 200


@given(
    text=st.text(st.characters(max_codepoint=255)),
    path=st.sampled_from([path for paths in PATHS.values() for path in paths]),
)
def test_no_other_text_is_a_token(guarded: Access, text: str, path: str) -> None:
    if text.strip() not in TOKENS.values():
        assert status(guarded, path, text.encode("latin-1")) == 401


@given(data=st.data())
def test_no_token_that_is_nearly_one_passes(guarded: Access, data: st.DataObject) -> None:
    token = TOKENS["predict"]
    at = data.draw(st.integers(0, len(token) - 1))
    by = data.draw(st.text("abcXYZ019-_", max_size=2).filter(lambda text: text != token[at]))
    assert status(guarded, "/predict", token[:at] + by + token[at + 1 :]) == 401


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"Basic dXNlcjpwYXNz", TOKENS["predict"].encode()]
)
def test_another_authorization_is_none(folder: Path, value: bytes) -> None:
    headers = [(b"authorization", value)]
    assert status(Access(folder), "/predict", headers=headers) == 401


def test_the_scheme_may_be_in_small_letters(folder: Path) -> None:
    headers = [(b"authorization", b"bearer " + TOKENS["predict"].encode())]
    assert status(Access(folder), "/predict", headers=headers) == 200


def test_a_right_without_tokens_is_given_to_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    access = Access(write(tmp_path, predict=TOKENS["predict"], feedback="\n \n"))
    assert status(access, "/predict", TOKENS["predict"]) == 200
    assert status(access, "/feedback", "") == 401
    assert status(access, "/model", TOKENS["admin"]) == 401
    for right in ("feedback", "metrics", "admin"):
        assert f"has no token of {right}: nobody gets it" in caplog.text


def test_a_token_may_give_several_rights(tmp_path: Path) -> None:
    both = TOKENS["predict"]
    access = Access(write(tmp_path, predict=both, feedback=f"{TOKENS['feedback']}\n{both}\n"))
    assert status(access, "/predict", both) == status(access, "/feedback", both) == 200
    assert status(access, "/metrics", both) == 403


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no token"),
        ({"predict": "\n"}, "has no token"),
        ({"predict": "short"}, "token 1 of"),
        ({"predict": f"{TOKENS['predict']}\nwith a blank in it"}, "token 2 of"),
        ({"predict": "é" * 20}, "token 1 of"),
    ],
)
def test_bad_files_are_refused_by_number_and_not_by_what_they_say(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Access(write(tmp_path, **files))
    assert not any(
        line and line in str(caught.value) for text in files.values() for line in text.splitlines()
    )


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no folder"):
        Access(tmp_path / "none")


def test_a_rotation_leaves_no_moment_without_a_valid_token(folder: Path) -> None:
    access = Access(folder)
    old, new = TOKENS["predict"], "a-new-token-0123456789"
    for text, good, bad in ((f"{old}\n{new}\n", {old, new}, set()), (new, {new}, {old})):
        (folder / "predict").write_text(text)
        asyncio.run(access.renew())
        assert {token for token in (old, new) if status(access, "/predict", token) == 200} == good
        assert {token for token in (old, new) if status(access, "/predict", token) == 401} == bad
    assert status(access, "/feedback", TOKENS["feedback"]) == 200


def test_an_old_token_may_lie_in_a_file_of_its_own(folder: Path) -> None:
    old = "an-old-token-0123456789"
    write(folder, **{"predict-old": old, "predictable": "x", "unknown": "x"})
    access = Access(folder)
    assert status(access, "/predict", old) == status(access, "/predict", TOKENS["predict"]) == 200
    (folder / "predict-old").unlink()
    asyncio.run(access.renew())
    assert status(access, "/predict", old) == 401


def test_a_secret_is_exchanged_by_its_links(tmp_path: Path) -> None:
    """As the kubelet does it: files are links into `..data`, which is a link to a folder."""
    first = write(tmp_path / "..1", **TOKENS)
    data = tmp_path / "..data"
    data.symlink_to(first.name)
    for right in RIGHTS:
        (tmp_path / right).symlink_to(f"..data/{right}")
    access = Access(tmp_path)
    second = write(tmp_path / "..2", **TOKENS | {"predict": "a-new-token-0123456789"})
    (tmp_path / "..data_tmp").symlink_to(second.name)
    (tmp_path / "..data_tmp").rename(data)
    asyncio.run(access.renew())
    assert status(access, "/predict", TOKENS["predict"]) == 401
    assert status(access, "/predict", "a-new-token-0123456789") == 200


def test_what_was_valid_stays_while_files_are_not(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    access = Access(folder)
    (folder / "predict").write_text("short")
    (folder / "feedback").write_text("another-token-0123456789")
    for _ in range(2):
        asyncio.run(access.renew())
    assert status(access, "/predict", TOKENS["predict"]) == 200
    assert status(access, "/feedback", TOKENS["feedback"]) == 200
    assert caplog.text.count("what was valid stays") == 1
    (folder / "predict").unlink()
    asyncio.run(access.renew())
    assert status(access, "/predict", TOKENS["predict"]) == 401
    assert status(access, "/feedback", "another-token-0123456789") == 200


def test_files_are_read_again_by_themselves_and_no_token_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setattr(access_module, "PERIOD", 0.01)
        access = Access(folder)
        await access.start()
        new = "a-new-token-0123456789"
        (folder / "admin").write_text(new)
        async with asyncio.timeout(10):
            while status(access, "/model", new) != 200:
                await asyncio.sleep(0.01)
        await access.stop()
        assert "1 of admin" in caplog.text
        assert not any(token in caplog.text for token in (*TOKENS.values(), new))

    asyncio.run(check())


@given(
    rate=st.floats(0.1, 1000),
    times=st.lists(st.floats(0, 5), min_size=1, max_size=200).map(sorted),
)
def test_a_client_gets_its_rate_and_a_second_more(rate: float, times: list[float]) -> None:
    """In any span it gets at most what the rate gives in it, and those of one second (one at
    least)."""
    limit = Rate(rate)
    let_in = [at for at in times if not limit.wait("it", at)]
    for first in range(len(let_in)):
        for last in range(first, len(let_in)):
            span = let_in[last] - let_in[first]
            assert last - first + 1 <= rate * span + max(1.0, rate) + 1e-6


@given(rate=st.floats(0.1, 1000), number=st.integers(1, 50))
def test_whoever_waits_as_told_is_let_in(rate: float, number: int) -> None:
    limit = Rate(rate)
    now = 100.0
    for _ in range(number):
        if wait := limit.wait("it", now):
            now += wait + 1e-6
            assert not limit.wait("it", now)


def test_the_rate_is_of_each_client_and_clients_are_not_kept_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rate_module, "CLIENTS", 10)
    limit = Rate(1)
    for client in range(100):
        assert not limit.wait(client, 0.0)
        assert limit.wait(client, 0.0) == pytest.approx(1.0)
    assert len(limit._due) == 10


def test_a_rate_is_of_a_token_and_without_tokens_of_an_address(folder: Path) -> None:
    write(folder, predict="one-token-0123456789\ntwo-token-0123456789")
    access = Access(folder, rate=1)
    assert status(access, "/predict", "one-token-0123456789") == 200
    assert status(access, "/predict", "one-token-0123456789") == 429
    assert status(access, "/predict", "two-token-0123456789") == 200
    access = Access(rate=1)
    assert status(access, "/predict") == 200
    assert status(access, "/feedback") == 429
    assert status(access, "/v2/models/tiny/infer", client=("10.0.0.2", 1)) == 200
    assert status(access, "/v2/models/tiny/infer", client=("10.0.0.2", 2)) == 429
    for _ in range(3):
        assert status(access, "/metrics") == status(access, "/model") == 200


async def ask(app: Any, method: str, path: str, token: str | None = None) -> httpx.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, headers=headers)


def test_refusals_are_answered_in_the_shape_of_the_protocol_and_counted(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    async def check() -> None:
        server = Server(store, "tiny", tmp_path / "spool")
        app = Mount(not_found, lambda: [server], lambda: Access(folder, rate=1))
        response = await ask(app, "POST", "/predict")
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "unauthorized"
        response = await ask(app, "GET", "/nothing", TOKENS["predict"])
        assert response.status_code == 403
        assert response.json()["error"] == {
            "code": "forbidden",
            "message": "This token does not give admin",
        }
        response = await ask(app, "POST", "/v2/models/tiny/infer")
        assert response.json() == {"error": "Send Authorization: Bearer TOKEN with a valid token"}
        # There is no version yet, so who is let in gets a 503.
        assert (await ask(app, "POST", "/predict", TOKENS["predict"])).status_code == 503
        response = await ask(app, "POST", "/predict", TOKENS["predict"])
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) == 1
        text = (await ask(app, "GET", "/metrics", TOKENS["metrics"])).text
        assert 'model_unauthorized_total{model="tiny"} 3.0' in text
        assert 'model_rate_limited_total{model="tiny"} 1.0' in text
        await server.stop()

    asyncio.run(check())


def test_several_models_take_the_rights_of_one(store: Store, folder: Path, tmp_path: Path) -> None:
    async def check() -> None:
        servers = [Server(store, name, tmp_path / name) for name in ("tiny", "other")]
        app = Mount(not_found, lambda: servers, lambda: Access(folder))
        for path, right in (
            ("/models/other/predict", "predict"),
            ("/models/other/feedback", "feedback"),
            ("/models/other", "admin"),
            ("/models/nobody/predict", "admin"),
            ("/models", "admin"),
            ("/metrics", "metrics"),
        ):
            assert (await ask(app, "POST", path)).status_code == 401, path
            for token in RIGHTS:
                refused = (await ask(app, "POST", path, TOKENS[token])).status_code == 403
                assert refused == (token != right), path
        assert (await ask(app, "GET", "/models/other/livez")).status_code in (200, 503)
        for server in servers:
            await server.stop()

    asyncio.run(check())


def test_a_websocket_is_refused_too(folder: Path) -> None:
    async def check() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        made = scope("/ws", type="websocket")
        why = Access(folder).check(made)
        assert isinstance(why, RequestError)
        await access_module.refuse(made, send, why)
        assert sent == [{"type": "websocket.close", "code": 1008}]

    asyncio.run(check())
