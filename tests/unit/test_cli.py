"""The command line, in this process and as one of its own, against a real server with a control of ours."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner, Result

from lbagent import admin, cli
from lbagent import check as checking
from lbagent.check import Finding, Verdict
from lbagent.client import Client
from lbagent.config import Admin
from lbagent.core.status import Standing
from lbagent.errors import ConfigError, DataplaneError, LinkError
from lbagent.tables import status_text
from tests.control import FakeControl, backend, service, status

QUICK = (
    "aiohttp",
    "asyncio",
    "bcc",
    "consul",
    "msgspec",
    "prometheus_client",
    "pyroute2",
    "structlog",
    "uvloop",
)


@contextmanager
def serving(path: Path, control: FakeControl) -> Iterator[None]:
    """The API in a thread with an event loop of its own."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(admin.serve(Admin(socket=path), control))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run, name="api")
    thread.start()
    try:
        while not path.exists():
            assert thread.is_alive(), "the server did not start"
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """The server must not write where the command line writes; what a command sets up ends with it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    with structlog.testing.capture_logs():
        yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def control() -> FakeControl:
    web2 = backend(
        "web-2", "node8", standing=Standing.WARNING, problems=("its next hop is not known",), hop=None
    )
    return FakeControl(status(service("web", backend("web-1"), web2, backend("a/b")), service("dns")))


@pytest.fixture
def path(tmp_path: Path, control: FakeControl) -> Iterator[Path]:
    with serving(tmp_path / "s", control):
        yield tmp_path / "s"


def call(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], env=environment)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lbagent", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=os.environ | environment, check=False
    )


# ---- status -------------------------------------------------------------------------------------


def test_status_is_a_table(path: Path) -> None:
    told = status_text(Client(path).status(), now=100.0).replace("02:00:00:00:00:21 dev eth0", "<hop>")
    assert told.splitlines() == [
        "lbagent 1.2.3, ready, program abcdef012345 on eth0 (native)",
        "adopted 90s ago, last change 10s ago, Consul answered 5s ago",
        "flow records: 3; drops: 7 fragment",
        "",
        "web  203.0.113.10:80/tcp, 203.0.113.10:80/udp, ring 4096 0123456789ab, Consul answered 5s ago",
        "  backend      address        standing  weight  slots  former  records  packets  next hop",
        "  node7/web-1  192.0.2.21:80  passing       10   2048       0        0     1000  <hop>",
        "  node8/web-2  192.0.2.21:80  warning       10   2048       0        0     1000  unknown",
        "    ! its next hop is not known",
        "  node7/a/b    192.0.2.21:80  passing       10   2048       0        0     1000  <hop>",
        "",
        "dns  203.0.113.10:80/tcp, 203.0.113.10:80/udp, ring 4096 0123456789ab, Consul answered 5s ago",
        "  no backends",
    ]


def test_status_over_the_socket(path: Path) -> None:
    result = call("status", "--socket", path)
    assert result.exit_code == 0
    assert "node7/web-1" in result.stdout


def test_status_as_json_is_the_apis_answer(path: Path) -> None:
    result = call("status", "--json", LBAGENT_SOCKET=str(path))
    assert [s["name"] for s in json.loads(result.stdout)["services"]] == ["web", "dns"]


def test_as_a_process_of_its_own(path: Path) -> None:
    result = process("status", "--json", LBAGENT_SOCKET=str(path))
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["version"] == "1.2.3"


def test_asking_is_quick() -> None:
    code = f"import sys, lbagent.cli, lbagent.tables; print([m for m in {QUICK} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ---- drain and undrain --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["node7/web-1"], ("node7", "web-1")),
        (["node7", "web-1"], ("node7", "web-1")),
        (["node7/a/b"], ("node7", "a/b")),
        (["node7", "a/b"], ("node7", "a/b")),
    ],
)
def test_a_backend_may_be_named_in_two_ways(
    path: Path, control: FakeControl, words: list[str], expected: tuple[str, str]
) -> None:
    result = call("drain", "web", *words, "--reason", "new disk", "--socket", path)
    assert result.exit_code == 0
    assert control.drained == [("web", *expected, "new disk")]
    assert '"new disk"' in result.stdout
    assert "not empty yet: 5 connections recorded, 2048 former slots" in result.stdout


def test_a_drain_keeps_its_reason_when_none_is_given(path: Path, control: FakeControl) -> None:
    call("drain", "web", "node7/web-1", "--reason", "new disk", "--socket", path)
    assert "new disk" in call("drain", "web", "node7/web-1", "--socket", path).stdout


def test_waiting_tells_by_exit_code_whether_it_is_empty(
    path: Path, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "duration_s", lambda *_: 0.01)
    result = call("drain", "web", "node7/web-1", "--wait", "60s", "--json", "--socket", path)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ended"] == "timeout"
    drain = control.drain

    async def at_once(service: str, node: str, id: str, reason: str) -> None:
        await drain(service, node, id, reason)
        control.change(service, node, id, empty=True, records=0, former_slots=0)

    control.drain = at_once  # type: ignore[method-assign] # this one is quicker
    result = call("drain", "web", "node7/web-1", "--wait", "60s", "--socket", path)
    assert result.exit_code == 0
    assert "it is empty" in result.stdout


def test_an_undrain_tells_the_new_state(path: Path) -> None:
    call("drain", "web", "node7/web-1", "--socket", path)
    result = call("undrain", "web", "node7/web-1", "--socket", path)
    assert result.exit_code == 0
    assert result.stdout == "web node7/web-1 is passing\nit gets new connections: 2048 slots\n"


@pytest.mark.parametrize("command", ["drain", "undrain"])
def test_a_refusal_names_what_exists(path: Path, command: str) -> None:
    result = call(command, "web", "node7/web-9", "--socket", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "allowed: node7/web-1, node8/web-2, node7/a/b" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["drain", "web"],
        ["drain", "web", "web-1"],
        ["drain", "web", "/web-1"],
        ["drain", "web", "a", "b", "c"],
        ["drain", "web", "node7/web-1", "--wait", "60"],
        ["drain", "web", "node7/web-1", "--wait", "2h"],
        ["drain", "web", "node7/web-1", "--until"],
        ["undrain", "web", "web-1"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_2_and_asks_nobody(words: list[str]) -> None:
    assert call(*words, LBAGENT_SOCKET="/nowhere").exit_code == 2


# ---- nobody there -------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["status"], ["drain", "web", "n/i"], ["undrain", "web", "n/i"]])
def test_no_agent_is_3(words: list[str], tmp_path: Path) -> None:
    result = call(*words, "--socket", tmp_path / "none")
    assert result.exit_code == 3
    assert f"{tmp_path}/none: No such file" in result.stderr


def test_a_socket_left_by_a_dead_agent_is_3(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    assert call("status", "--socket", tmp_path / "s").exit_code == 3


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n<>"]
)
def test_something_else_that_answers_is_3(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()

        def serve() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        result = call("status", "--socket", tmp_path / "s")
        thread.join()
    assert result.exit_code == 3


# ---- what does the work itself ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "backend", "detach"])
def test_a_bad_configuration_stops_the_start_and_names_the_key(tmp_path: Path, command: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[edge]\ninterfaces = ["eth0"]\nmod = "auto"\n')
    result = call(command, "--config", path)
    assert result.exit_code == 1
    assert "edge.mod" in result.stderr
    assert "Traceback" not in result.stderr
    assert call(command, "--config", tmp_path / "none").exit_code == 1


def test_defaults_are_the_agents() -> None:
    assert Path(cli.SOCKET) == Admin().socket
    assert cli.LONGEST_WAIT_S == admin.LONGEST_WAIT_S


def test_errors_in_a_task_group_are_told_like_others(capsys: pytest.CaptureFixture[str]) -> None:
    inner = ExceptionGroup("tasks", [LinkError("eth0: no such device")])
    with pytest.raises(SystemExit) as left, cli.failing():
        raise ExceptionGroup("tasks", [inner, ConfigError("edge.mode")])
    assert left.value.code == 1
    assert capsys.readouterr().err == "lbagent: eth0: no such device\nlbagent: edge.mode\n"


def test_an_unknown_error_is_not_hidden() -> None:
    with pytest.raises(ExceptionGroup), cli.failing():
        raise ExceptionGroup("tasks", [DataplaneError("rings"), ZeroDivisionError()])


# ---- check --------------------------------------------------------------------------------------


def finds(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    probe: Callable[[object], list[Finding]] = lambda _: list(findings)  # noqa: E731
    monkeypatch.setattr(checking, "PROBES", (probe,))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.toml"
    path.write_text('[edge]\ninterfaces = ["eth0"]\n')
    return path


def test_check_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch, good: Path) -> None:
    finds(monkeypatch, Finding("bcc", Verdict.MISSING, "not to be found", "apt install python3-bpfcc"))
    result = call("check", "--config", good)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"ok       configuration: {good}",
        "missing  bcc: not to be found",
        "         -> apt install python3-bpfcc",
    ]


def test_a_warning_is_no_failure(monkeypatch: pytest.MonkeyPatch, good: Path) -> None:
    finds(monkeypatch, Finding("Consul", Verdict.WARNING, "no answer", "start it"))
    result = call("check", "--config", good, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[1] == {
        "what": "Consul", "verdict": "warning", "text": "no answer", "todo": "start it",
    }  # fmt: skip


def test_check_tells_each_mistake_in_the_configuration_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finds(monkeypatch, Finding("kernel", Verdict.OK, "6.18"))
    (tmp_path / "c.toml").write_text('[edge]\nmod = "auto"\nvips = 0\n')
    found = checking.check(tmp_path / "c.toml", {})
    told = [f.text for f in found if f.verdict is Verdict.MISSING]
    assert any("edge.mod" in text for text in told)
    assert any("edge.vips" in text for text in told)
    assert found[-1].what == "kernel"


@pytest.mark.parametrize(
    ("effective", "lacking"),
    [
        (0, ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]),
        (1 << 12 | 1 << 38 | 1 << 39, ["CAP_SYS_ADMIN"]),
        (1 << 21, ["CAP_NET_ADMIN"]),
        (1 << 12 | 1 << 21, []),
        ((1 << 41) - 1, []),
    ],
)
def test_capabilities(effective: int, lacking: list[str]) -> None:
    assert checking.lacking_capabilities(effective) == lacking
