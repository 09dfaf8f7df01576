"""The HTTP API, over real sockets by real clients; behind it a control that the test moves by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import ClientResponse, ClientSession, UnixConnector
from yarl import URL

from lbagent import admin
from lbagent.config import Admin, Endpoint
from lbagent.control import Control
from lbagent.errors import ConfigError, DataplaneError, InconsistentSnapshot
from lbagent.listen import unix_listener
from tests.control import FakeControl, backend, service, status

WEB1 = "/v1/services/web/backends/node7/web-1"
ODD_IDS = [
    "web/1", "a//b", "/", "100%", "%2F", "%252F", "%zz", "a b", "ä€", "x?y#z", "drain", "x/drain", "+", "..",
    "a;b=c", "{id}", '"', "\\", "a:b@c",
]  # fmt: skip


@contextlib.asynccontextmanager
async def serving(config: Admin, control: Control) -> AsyncIterator[asyncio.Task[None]]:
    """The server, from when its unix socket is there until the block ends."""
    task = asyncio.create_task(admin.serve(config, control))
    try:
        while not config.socket.exists():
            if task.done():
                task.result()
            await asyncio.sleep(0)
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Client:
    """Answers as (status, content)."""

    def __init__(self, session: ClientSession, base: str, headers: dict[str, str] | None = None) -> None:
        self._session = session
        self._base = base
        self._headers = headers

    async def __call__(self, method: str, path: str, data: object = None) -> tuple[int, Any]:
        url = URL(self._base + path, encoded=True)
        async with self._session.request(method, url, data=data, headers=self._headers) as response:
            return response.status, await content(response)

    async def get(self, path: str) -> tuple[int, Any]:
        return await self("GET", path)

    async def post(self, path: str, data: object = None) -> tuple[int, Any]:
        return await self("POST", path, data)


async def content(response: ClientResponse) -> Any:
    text = await response.text()
    return json.loads(text) if response.content_type == "application/json" else text


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(status(service("web", backend("web-1"), backend("web-2", "node8")), service("dns")))


@pytest.fixture
def config(tmp_path: Path) -> Admin:
    return Admin(socket=tmp_path / "admin.sock")


@pytest.fixture
async def api(config: Admin, control: FakeControl) -> AsyncIterator[Client]:
    async with (
        serving(config, control),
        ClientSession(connector=UnixConnector(str(config.socket))) as session,
    ):
        yield Client(session, "http://agent")


# ---- reading ------------------------------------------------------------------------------------


async def test_status_tells_all(api: Client) -> None:
    code, told = await api.get("/v1/status")
    assert code == 200
    assert told["ready"] is True
    assert told["devices"] == [{"name": "eth0", "mode": "native"}]
    assert told["drops"] == {"fragment": 7}
    web = told["services"][0]
    assert web["vips"] == [
        {"address": "203.0.113.10", "port": 80, "proto": "tcp"},
        {"address": "203.0.113.10", "port": 80, "proto": "udp"},
    ]
    assert web["backends"][0] == {
        "node": "node7", "id": "web-1", "address": "192.0.2.21", "port": 80, "standing": "passing",
        "weight": 10, "slots": 2048, "former_slots": 0, "records": 0, "empty": False,
        "hop": "02:00:00:00:00:21 dev eth0", "packets": 1000, "bytes": 64000, "reason": "", "since": 0.0,
        "problems": [],
    }  # fmt: skip


async def test_services_one_and_all(api: Client) -> None:
    assert [s["name"] for s in (await api.get("/v1/services"))[1]["services"]] == ["web", "dns"]
    assert (await api.get("/v1/services/dns"))[1]["backends"] == []


async def test_an_unknown_service_is_404_and_names_those_that_are(api: Client) -> None:
    code, told = await api.get("/v1/services/wbe")
    assert (code, told["allowed"]) == (404, ["web", "dns"])
    assert "wbe" in told["error"]


async def test_ready_or_why_not(api: Client, control: FakeControl) -> None:
    assert await api.get("/readyz") == (200, {"ready": True})
    control.report(replace(control.now, ready=False, consul_answer_at=0.0, problems=("no memory",)))
    code, told = await api.get("/readyz")
    assert code == 503
    assert told["why"] == ["Consul has not answered yet", "no memory"]
    control.report(replace(control.now, consul_answer_at=1.0, problems=()))
    assert (await api.get("/readyz"))[1]["why"] == ["the first full answer from Consul is not applied yet"]
    assert await api.get("/healthz") == (200, {"alive": True})


async def test_metrics_are_text(api: Client) -> None:
    code, text = await api.get("/metrics")
    assert code == 200
    assert "\nlbagent_ready 1.0\n" in text


# ---- draining -----------------------------------------------------------------------------------


async def test_a_drain_answers_with_state_records_and_whether_it_is_empty(
    api: Client, control: FakeControl
) -> None:
    code, told = await api.post(f"{WEB1}/drain", '{"reason": "new disk"}')
    assert code == 200
    assert control.drained == [("web", "node7", "web-1", "new disk")]
    expected = {"service": "web", "node": "node7", "standing": "drained", "reason": "new disk", "records": 5}
    assert told.items() >= {**expected, "empty": False, "ended": "timeout"}.items()


@pytest.mark.parametrize(
    ("query", "body"),
    [("?reason=new%20disk", None), ("?reason=new+disk", ""), ("", b'{"reason": "new disk"}')],
)
async def test_a_reason_comes_in_query_or_body(
    api: Client, control: FakeControl, query: str, body: object
) -> None:
    assert (await api.post(f"{WEB1}/drain{query}", body))[0] == 200
    assert control.drained[0][3] == "new disk"


async def test_a_repeated_drain_keeps_the_reason_unless_it_brings_another(
    api: Client, control: FakeControl
) -> None:
    await api.post(f"{WEB1}/drain?reason=new+disk")
    assert (await api.post(f"{WEB1}/drain"))[1]["reason"] == "new disk"
    assert (await api.post(f"{WEB1}/drain?reason=old+disk"))[1]["reason"] == "old disk"
    assert (await api.post(f"{WEB1}/drain?reason="))[1]["reason"] == ""


async def test_a_held_answer_comes_when_the_backend_is_empty(api: Client, control: FakeControl) -> None:
    await api.post(f"{WEB1}/drain")
    answer = asyncio.create_task(api.post(f"{WEB1}/drain?wait=60s"))
    await control.waits.wait()
    control.change("web", "node7", "web-1", records=1)
    await control.waits.wait()
    assert not answer.done()
    control.change("web", "node7", "web-1", records=0, former_slots=0, empty=True)
    code, told = await answer
    assert (code, told["ended"], told["empty"]) == (200, "empty", True)


async def test_an_empty_backend_is_answered_for_at_once(api: Client, control: FakeControl) -> None:
    control.change("web", "node7", "web-1", standing="drained")
    drain = control.drain

    async def drains_at_once(service: str, node: str, id: str, reason: str) -> None:
        await drain(service, node, id, reason)
        control.change(service, node, id, empty=True)

    control.drain = drains_at_once  # type: ignore[method-assign] # this one is quicker
    assert (await api.post(f"{WEB1}/drain?wait=60s"))[1]["ended"] == "empty"


async def test_a_held_answer_comes_when_time_is_up(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "duration_s", lambda *_: 0.01)
    code, told = await api.post(f"{WEB1}/drain?wait=60s")
    assert (code, told["ended"], told["empty"]) == (200, "timeout", False)
    assert told["waited_s"] >= 0.01


async def test_a_held_answer_comes_when_the_agent_stops(config: Admin, control: FakeControl) -> None:
    async with (
        serving(config, control) as server,
        ClientSession(connector=UnixConnector(str(config.socket))) as session,
    ):
        api = Client(session, "http://agent")
        answer = asyncio.create_task(api.post(f"{WEB1}/drain?wait=1h"))
        await control.waits.wait()
        server.cancel()
        code, told = await answer
    assert (code, told["ended"], told["empty"]) == (200, "stopping", False)


async def test_an_undrain_ends_the_wait_as_a_conflict(api: Client, control: FakeControl) -> None:
    answer = asyncio.create_task(api.post(f"{WEB1}/drain?wait=1h"))
    await control.waits.wait()
    assert (await api.post(f"{WEB1}/undrain"))[1]["standing"] == "passing"
    assert (await answer)[0] == 409


async def test_a_backend_that_is_freed_ends_the_wait_as_not_found(api: Client, control: FakeControl) -> None:
    answer = asyncio.create_task(api.post(f"{WEB1}/drain?wait=1h"))
    await control.waits.wait()
    control.remove("web", "node7", "web-1")
    assert await answer == (
        404,
        {"error": "backend node7/web-1 of service web is not there any more", "allowed": ["node8/web-2"]},
    )


async def test_a_client_that_went_away_is_not_waited_for(config: Admin, control: FakeControl) -> None:
    async with serving(config, control):
        _, writer = await asyncio.open_unix_connection(str(config.socket))
        writer.write(f"POST {WEB1}/drain?wait=1h HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await control.waits.wait()
        writer.close()
        await writer.wait_closed()
        for _ in range(10):  # the server's loop learns of it
            await asyncio.sleep(0)
        control.change("web", "node7", "web-1", records=1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not control.waits.is_set()


async def test_undraining_a_drained_backend_that_is_not_registered_any_more(
    api: Client, control: FakeControl
) -> None:
    undrain = control.undrain

    async def forgets(service: str, node: str, id: str) -> None:
        await undrain(service, node, id)
        control.remove(service, node, id)

    control.undrain = forgets  # type: ignore[method-assign] # it was only an intent
    code, told = await api.post(f"{WEB1}/undrain")
    assert (code, told["standing"], told["empty"]) == (200, "gone", True)


@pytest.mark.parametrize("id_", ODD_IDS)
async def test_an_id_may_be_any_text(config: Admin, id_: str) -> None:
    control = FakeControl(status(service("w/e%b", backend(id_, "node 7"))))
    async with (
        serving(config, control),
        ClientSession(connector=UnixConnector(str(config.socket))) as session,
    ):
        api = Client(session, "http://agent")
        escaped = "/".join(quote(part, safe="") for part in ("w/e%b", "backends", "node 7", id_))
        code, told = await api.post(f"/v1/services/{escaped}/drain")
        assert (code, told.get("id"), control.drained) == (200, id_, [("w/e%b", "node 7", id_, "")])
        assert (await api.post(f"/v1/services/{escaped}/undrain"))[1]["standing"] == "passing"


async def test_slashes_in_an_id_may_come_unescaped(config: Admin) -> None:
    control = FakeControl(status(service("web", backend("pool/web/1"))))
    async with (
        serving(config, control),
        ClientSession(connector=UnixConnector(str(config.socket))) as session,
    ):
        assert (
            await Client(session, "http://agent").post("/v1/services/web/backends/node7/pool/web/1/drain")
        )[0] == 200


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "body", "named"),
    [
        ("?wait=60", None, "60"),
        ("?wait=-1s", None, "-1s"),
        ("?wait=2h", None, "0s to 1h"),
        ("?wait=", None, "wait"),
        ("?wiat=60s", None, "wiat"),
        ("?wait=1s&wait=2s", None, "twice"),
        ("?reason=a", '{"reason": "b"}', "query and in the body"),
        ("?reason=a%0Ab", None, "control characters"),
        ("", "{", "truncated"),
        ("", '["a"]', "Expected `object`"),
        ("", '{"reason": 7}', "Expected `str"),
        ("", '{"raeson": "x"}', "raeson"),
        ("", json.dumps({"reason": "x" * 501}), "<= 500"),
        ("?reason=" + "x" * 501, None, "500"),
        ("", b"\xff\xfe", "JSON is malformed"),
    ],
)
async def test_a_request_that_makes_no_sense_is_400_and_changes_nothing(
    api: Client, control: FakeControl, query: str, body: object, named: str
) -> None:
    code, told = await api.post(f"{WEB1}/drain{query}", body)
    assert code == 400
    assert named in told["error"] + str(told["allowed"])
    assert told["allowed"]
    assert control.drained == []


async def test_a_body_too_large_is_413(api: Client, control: FakeControl) -> None:
    code, told = await api.post(f"{WEB1}/drain", b" " * (admin.BODY_BYTES + 1))
    assert code == 413
    assert told["error"]
    assert control.drained == []


@pytest.mark.parametrize(
    "path",
    ["/v1/status", "/v1/services", "/v1/services/web", "/metrics", "/healthz", "/readyz", f"{WEB1}/undrain"],
)
async def test_an_unknown_query_key_is_refused_everywhere(api: Client, path: str) -> None:
    code, told = await api("POST" if "undrain" in path else "GET", f"{path}?wait=1s")
    assert (code, told["allowed"]) == (400, [])


async def test_a_body_that_does_not_come_is_408(
    config: Admin, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "BODY_S", 0.01)
    async with serving(config, control):
        reader, writer = await asyncio.open_unix_connection(str(config.socket))
        writer.write(f"POST {WEB1}/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode())
        assert b" 408 " in await reader.readline()
        writer.close()
    assert control.drained == []


async def test_unknown_backends_and_paths_are_404_and_say_what_exists(api: Client) -> None:
    code, told = await api.post("/v1/services/web/backends/node7/web-9/drain")
    assert (code, told["allowed"]) == (404, ["node7/web-1", "node8/web-2"])
    code, told = await api.post("/v1/services/wbe/backends/node7/web-1/undrain")
    assert (code, told["allowed"]) == (404, ["dns", "web"])
    code, told = await api.get("/v2/status")
    assert code == 404
    assert "/v1/status" in told["allowed"]


async def test_a_wrong_method_is_405_and_says_which(api: Client) -> None:
    assert (await api.get(f"{WEB1}/drain"))[0] == 405
    code, told = await api("DELETE", "/v1/status")
    assert (code, told["allowed"]) == (405, ["GET", "HEAD"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataplaneError("rings: no memory", 12), 503),
        (InconsistentSnapshot("a service is wanted twice"), 503),
        (TimeoutError(), 504),
        (ZeroDivisionError("secret"), 500),
    ],
)
async def test_what_the_agent_cannot_do_is_told_as_json(
    api: Client, control: FakeControl, error: Exception, code: int
) -> None:
    control.error = error
    answered, told = await api.post(f"{WEB1}/drain")
    assert answered == code
    assert told["error"]
    assert "secret" not in told["error"]


# ---- TCP ----------------------------------------------------------------------------------------


@pytest.fixture
def tcp(config: Admin, tmp_path: Path) -> Admin:
    token_file = tmp_path / "token"
    token_file.write_text("s3cret\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Admin(socket=config.socket, address=Endpoint(f"127.0.0.1:{port}"), token_file=token_file)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("Bearer s3cret", 200),
        ("bearer  s3cret", 200),
        ("Bearer s3cre", 401),
        ("Bearer s3cret2", 401),
        ("Bearer ", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer s\u00e9cret", 401),
        (None, 401),
    ],
)
async def test_tcp_needs_the_token(tcp: Admin, control: FakeControl, header: str | None, code: int) -> None:
    async with serving(tcp, control), ClientSession() as session:
        headers = {"Authorization": header} if header else {}
        api = await until_listening(Client(session, f"http://{tcp.address}", headers))
        for method, path in [("GET", "/v1/status"), ("GET", "/metrics"), ("GET", "/v1/services/web")]:
            assert (await api(method, path))[0] == code
        assert (await api.post(f"{WEB1}/drain"))[0] == code
        assert (await api.get("/nowhere"))[0] == (404 if code == 200 else 401)
        assert bool(control.drained) == (code == 200)
        assert (await api.get("/healthz"))[0] == (await api.get("/readyz"))[0] == 200


async def until_listening(api: Client) -> Client:
    """The TCP address comes a moment after the unix socket."""
    while True:
        try:
            await api.get("/healthz")
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0)
        else:
            return api


async def test_a_token_file_that_is_empty_or_missing_stops_the_start(
    tcp: Admin, control: FakeControl
) -> None:
    assert tcp.token_file is not None
    tcp.token_file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        await admin.serve(tcp, control)
    tcp.token_file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        await admin.serve(tcp, control)
    assert not tcp.socket.exists()


async def test_an_address_in_use_stops_the_start(tcp: Admin, control: FakeControl) -> None:
    host, port = str(tcp.address).split(":")
    with socket.create_server((host, int(port))), pytest.raises(ConfigError, match=r"admin\.address"):
        await admin.serve(tcp, control)


# ---- the socket ---------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_socket_has_its_mode_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with unix_listener(tmp_path / "run" / "s", None):
            assert stat.S_IMODE((tmp_path / "run" / "s").stat().st_mode) == 0o660
    finally:
        os.umask(before)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_socket_left_by_a_dead_agent_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with unix_listener(path, None), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_on_which_somebody_listens_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_listener(path, None):
        with pytest.raises(ConfigError, match="another process listens"), unix_listener(path, None):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"), unix_listener(path, None):
        pass
    assert path.read_text() == "mine"


def test_the_next_agents_socket_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_listener(path, None):
        path.unlink()
        path.write_text("the next one's")
    assert path.exists()


@pytest.mark.parametrize(("path", "group"), [("x" * 200, None), ("s", "no-such-group")])
def test_a_socket_that_cannot_be_made_is_named(tmp_path: Path, path: str, group: str | None) -> None:
    with pytest.raises(ConfigError, match=r"admin\.socket"), unix_listener(tmp_path / path, group):
        pass
