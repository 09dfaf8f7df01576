"""The watches against a real Consul, and with a liar between: what is known changes only with the truth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from lbagent.config import Consul as Settings
from lbagent.config import Url, Wait
from lbagent.consul import NodeWatcher, Watcher, client
from lbagent.core.desired import Defaults, desired
from lbagent.core.dsr import Registration
from lbagent.core.model import Capacity, Live, Snapshot
from lbagent.core.state import ConsulFailed, Event, State, fold
from lbagent.core.status import Standing
from tests.world.consul import binary
from tests.world.liar import Kind, Liar, Lie
from tests.world.procs import until

EMPTY = Live(Capacity(8, 64, 1024))
PATIENCE_S = 30
ROOT_TOKEN = "b1gs33cr3t-0000-0000-0000-000000000000"


# ---- a Consul on loopback -----------------------------------------------------------------------


@dataclass
class Server:
    address: str
    token: str = ""

    def ask(self, method: str, path: str, body: object = None) -> Any:
        request = Request(
            f"{self.address}/v1/{path}", method=method, data=json.dumps(body).encode() if body else None
        )
        if self.token:
            request.add_header("X-Consul-Token", self.token)
        with urlopen(request, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def register(
        self,
        id: str,
        service: str,
        n: int,
        *,
        status: str = "passing",
        tags: tuple[str, ...] = ("lb",),
        weight: int = 1,
    ) -> None:
        self.ask(
            "PUT",
            "agent/service/register",
            {
                "Name": service,
                "ID": id,
                "Port": 80,
                "Address": f"10.0.0.{n}",
                "Tags": list(tags),
                "Meta": {"lb-vip": f"203.0.113.{len(service)}"},
                "Weights": {"Passing": weight, "Warning": 1},
                "Check": {"CheckID": f"c-{id}", "TTL": "600s", "Status": status},
            },
        )

    def deregister(self, id: str) -> None:
        self.ask("PUT", f"agent/service/deregister/{id}")


def free_ports() -> dict[str, int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return dict(zip(("http", "server", "serf_lan", "serf_wan"), ports, strict=True))


@contextlib.contextmanager
def consul(folder: Path, ports: dict[str, int], token: str = "", **special: object) -> Iterator[Server]:
    """A lone server that leads."""
    config = {
        "node_name": "one",
        "data_dir": str(folder / "data"),
        "bind_addr": "127.0.0.1",
        "client_addr": "127.0.0.1",
        "server": True,
        "bootstrap_expect": 1,
        "performance": {"raft_multiplier": 1},
        "disable_update_check": True,
        "ports": {"dns": -1, "grpc": -1, **ports},
        "log_level": "warn",
        **special,
    }
    (folder / "consul.json").write_text(json.dumps(config))
    argv = ("setpriv", "--pdeathsig", "KILL", binary(), "agent", f"-config-file={folder / 'consul.json'}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "2"})
    server = Server(f"http://127.0.0.1:{ports['http']}", token)
    try:
        until(lambda: server.ask("GET", "catalog/node/one"), "Consul to lead")
        yield server
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with consul(tmp_path_factory.mktemp("consul"), free_ports()) as server:
        yield server


@pytest.fixture
def services(server: Server) -> Server:
    """Services web (two instances), api (one), and one that is not ours."""
    for name in server.ask("GET", "agent/services"):
        server.deregister(name)
    server.register("w1", "web", 1)
    server.register("w2", "web", 2)
    server.register("a1", "api2", 3)
    server.register("d1", "db", 4, tags=("x",))
    return server


# ---- what the watches tell ----------------------------------------------------------------------


@dataclass
class Known:
    """The state that the events make, and what follows from it."""

    state: State = field(default_factory=State)
    failures: list[ConsulFailed] = field(default_factory=list)
    nodes: list[tuple[Registration, ...]] = field(default_factory=list)
    turned: asyncio.Event = field(default_factory=asyncio.Event)
    wants: list[Snapshot] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.state = fold(self.state, event)
        if isinstance(event, ConsulFailed):
            self.failures.append(event)
        want = desired(self.state, EMPTY, Defaults(), self.state.answer_at).want
        if not self.wants or want != self.wants[-1]:
            self.wants.append(want)
        self.turned.set()

    def node(self, found: tuple[Registration, ...]) -> None:
        self.nodes.append(found)
        self.turned.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.turned.clear()
                await self.turned.wait()

    def standings(self, service: str) -> dict[str, Standing]:
        found = self.state.services.get(service)
        return {i.id: i.standing for i in found.instances} if found else {}


@contextlib.asynccontextmanager
async def knowing(address: str, node: bool = False, **access: Any) -> AsyncIterator[Known]:
    known = Known()
    settings = Settings(address=Url(address), wait=Wait(1), **access)
    async with asyncio.TaskGroup() as tasks:
        watches = [tasks.create_task(Watcher(settings).run(known.emit))]
        if node:
            watches.append(tasks.create_task(NodeWatcher(settings).run(known.node)))
        try:
            yield known
        finally:
            for task in watches:
                task.cancel()


OK = Standing.PASSING


async def test_what_happens_in_consul_is_told(services: Server) -> None:
    async with knowing(services.address) as known:
        await known.until(lambda: known.state.full_at)
        assert set(known.state.services) == {"web", "api2"}
        assert known.standings("web") == {"w1": OK, "w2": OK}
        services.ask("PUT", "agent/check/warn/c-w1")
        await known.until(lambda: known.standings("web")["w1"] is Standing.WARNING)
        services.ask("PUT", "agent/check/fail/c-w1")
        await known.until(lambda: known.standings("web")["w1"] is Standing.CRITICAL)
        services.ask("PUT", "agent/service/maintenance/w2?enable=true")
        await known.until(lambda: known.standings("web")["w2"] is Standing.MAINTENANCE)
        services.ask("PUT", "agent/service/maintenance/w2?enable=false")
        services.ask("PUT", "agent/check/pass/c-w1")
        await known.until(lambda: known.standings("web") == {"w1": OK, "w2": OK})
        services.ask("PUT", "agent/maintenance?enable=true")
        await known.until(lambda: set(known.standings("web").values()) == {Standing.MAINTENANCE})
        services.ask("PUT", "agent/maintenance?enable=false")
        services.register("w1", "web", 1, weight=9)
        await known.until(lambda: known.state.services["web"].instances[0].weight_passing == 9)
        services.register("d1", "db", 4)
        await known.until(lambda: known.standings("db") == {"d1": OK})
        assert not known.failures


async def test_the_last_instance_that_goes_is_believed_and_may_come_back(services: Server) -> None:
    async with knowing(services.address) as known:
        await known.until(lambda: known.state.full_at)
        services.deregister("a1")
        await known.until(lambda: known.state.listed == frozenset({"web"}))
        assert known.standings("api2") == {}
        services.register("a1", "api2", 3)
        await known.until(lambda: known.standings("api2") == {"a1": OK})
        services.register("a1", "api2", 3, tags=("x",))
        await known.until(lambda: known.standings("api2") == {} and known.state.listed == frozenset({"web"}))


async def test_services_of_the_node(services: Server) -> None:
    async with knowing(services.address, node=True) as known:
        await known.until(lambda: known.nodes)
        assert [(r.service, r.id, r.port) for r in known.nodes[-1]] == [
            ("api2", "a1", 80),
            ("web", "w1", 80),
            ("web", "w2", 80),
        ]
        for name in ("a1", "w1", "w2"):
            services.deregister(name)
        await known.until(lambda: known.nodes[-1] == ())


PARTS = ("/v1/catalog/", "/v1/health/")
LIES = [
    *(Lie(kind) for kind in Kind),
    *(Lie(kind, path) for kind in (Kind.EMPTY, Kind.NONSENSE, Kind.BACKWARDS, Kind.ERROR) for path in PARTS),
    *(Lie(kind, path, consistent=False) for kind in (Kind.EMPTY, Kind.FILTERED) for path in ("/v1/", *PARTS)),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie.kind}-{lie.path}-{lie.consistent}")
async def test_no_lie_takes_anything_away(
    services: Server, monkeypatch: pytest.MonkeyPatch, lie: Lie
) -> None:
    monkeypatch.setattr(client, "ANSWER_S", 0.5)
    liar = Liar(services.address)
    async with liar.serving() as address, knowing(address, node=True) as known:
        await known.until(lambda: known.state.full_at and known.nodes)
        want, node = known.wants[-1], known.nodes[-1]
        wants = len(known.wants)
        liar.lie(lie)
        if lie.kind is Kind.BACKWARDS:
            await known.until(lambda: liar.told > 9)
        else:
            await known.until(lambda: len(known.failures) > 2)
        assert known.wants[wants:] == []
        assert known.nodes == [node]
        liar.lie(None)
        services.deregister("w1")
        await known.until(lambda: known.standings("web") == {"w2": OK} and len(known.nodes) > 1)
        await known.until(
            lambda: not known.state.error and not any(s.error for s in known.state.services.values())
        )
        assert len(known.wants) == wants + 1
        assert known.wants[-1] != want


async def test_a_restart_of_consul_takes_nothing_away(tmp_path: Path) -> None:
    ports = free_ports()
    async with contextlib.AsyncExitStack() as watches:
        with consul(tmp_path, ports) as server:
            server.register("w1", "web", 1)
            server.ask("PUT", "agent/check/pass/c-w1")  # else the agent does not remember it
            known = await watches.enter_async_context(knowing(server.address))
            await known.until(lambda: known.state.full_at)
            wants = list(known.wants)
        await known.until(lambda: known.state.error and known.state.services["web"].error)
        with consul(tmp_path, ports) as server:
            await known.until(lambda: not known.state.error and not known.state.services["web"].error)
            assert known.wants == wants
            server.register("w2", "web", 2)
            await known.until(lambda: known.standings("web") == {"w1": OK, "w2": OK})


async def test_a_token_that_may_read_nothing_is_no_answer_and_one_that_may_read_is(tmp_path: Path) -> None:
    acl = {"enabled": True, "default_policy": "deny", "tokens": {"master": ROOT_TOKEN, "agent": ROOT_TOKEN}}
    with consul(tmp_path, free_ports(), ROOT_TOKEN, acl=acl) as server:
        server.register("w1", "web", 1)
        async with knowing(server.address) as known:
            await known.until(lambda: len(known.failures) > 1)
            assert known.state.listed is None
        rules = " ".join(f'{kind}_prefix "" {{ policy = "read" }}' for kind in ("service", "node", "agent"))
        server.ask("PUT", "acl/policy", {"Name": "lbagent", "Rules": rules})
        token = server.ask("PUT", "acl/token", {"Policies": [{"Name": "lbagent"}]})["SecretID"]
        token_file = tmp_path / "token"
        token_file.write_text(token)
        async with knowing(server.address, node=True, token_file=token_file) as known:
            await known.until(lambda: known.state.full_at and known.nodes)
            assert known.standings("web") == {"w1": OK}
            assert not known.failures
