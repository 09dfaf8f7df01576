"""The whole small world: Consul, a client, an edge node with `lbagent run`, backends with `lbagent backend`.

Each host has Consul's agent, as real nodes do. The client reaches all VIPs by way of the edge; backends
answer it directly.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.world import consul, traffic
from tests.world.http import Http, HttpError
from tests.world.net import Host, Net, ip, net
from tests.world.procs import Proc, Procs, procs, until

VIPS = "203.0.113.0/24"
WEB_PORT = 80
LBAGENT = str(Path(sys.executable).with_name("lbagent"))  # the command as installed


@dataclass(slots=True)
class Backend:
    """A node with a web server for all services, and lbagent's helper."""

    host: Host
    consul: consul.Agent
    web: Proc
    config: Path
    helper: Proc

    @property
    def name(self) -> str:
        return self.host.name

    def has(self, vip: str) -> bool:
        return f" {vip}/32 " in ip(f"-n {self.host.namespace} -oneline address show dev lo")


@dataclass(slots=True)
class Edge:
    """The node whose agent is under test. Its agent may be killed and started again."""

    host: Host
    consul: consul.Agent
    config: Path
    api: Http
    procs: Procs
    agent: Proc | None = None

    def start(self, env: Mapping[str, str] | None = None, wait: bool = True) -> None:
        self.agent = self.procs.start(
            self.host, "lbagent", LBAGENT, "run", f"--config={self.config}", env=env
        )
        if wait:
            until(self.is_ready, "the agent to be ready")

    def is_ready(self) -> bool:
        assert self.agent is not None
        assert self.agent.is_running, f"the agent ended by itself\n{self.agent.tail()}"
        try:
            self.api("GET", "/readyz")
        except HttpError:
            return False
        return True

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        assert self.agent is not None
        self.agent.stop(sig)

    def detach(self) -> int:
        """End the agent and take away what it left in the kernel."""
        self.kill(signal.SIGTERM)
        return self.procs.start(self.host, "detach", LBAGENT, "detach", f"--config={self.config}").wait()

    def status(self) -> Any:
        return self.api("GET", "/v1/status")

    def service(self, name: str) -> Any:
        """Its status; None if the agent does not know it."""
        try:
            return self.api("GET", f"/v1/services/{quote(name)}")
        except HttpError as e:
            if e.status == 404:
                return None
            raise

    def backends(self, service: str) -> dict[str, Any]:
        """The status of each backend, by its node."""
        status = self.service(service)
        return {backend["node"]: backend for backend in status["backends"]} if status else {}

    def drain(self, service: str, node: str, wait_s: int = 0, reason: str = "") -> Any:
        path = f"/v1/services/{quote(service)}/backends/{node}/{quote(service)}-{node}/drain"
        wait = f"?wait={wait_s}s" if wait_s else ""
        return self.api("POST", path + wait, {"reason": reason} if reason else None, timeout_s=wait_s + 10)

    def undrain(self, service: str, node: str) -> Any:
        return self.api(
            "POST", f"/v1/services/{quote(service)}/backends/{node}/{quote(service)}-{node}/undrain"
        )


@dataclass(slots=True)
class Lab:
    net: Net
    procs: Procs
    server: consul.Agent
    client: Host
    edge: Edge
    backends: dict[str, Backend] = field(default_factory=dict)

    def add_backend(self, name: str, number: int) -> Backend:
        """A node with its processes under way; `until_up` waits for them."""
        host = self.net.add_host(name, number)
        agent = consul.start_agent(self.procs, host, self.server)
        web = self.start_web(host)
        config = self.procs.folder / f"{name}.toml"
        config.write_text(backend_config(self.net, host, self.procs.folder))
        self.backends[name] = Backend(host, agent, web, config, self.start_helper(host, config))
        return self.backends[name]

    def start_helper(self, host: Host, config: Path) -> Proc:
        return self.procs.start(host, f"helper-{host.name}", LBAGENT, "backend", f"--config={config}")

    def lbagent(self, host: Host, *argv: str) -> tuple[int, str]:
        """Run a command of lbagent to its end: exit code and what it printed."""
        proc = self.procs.start(host, f"lbagent-{argv[0]}-{len(self.procs.all)}", LBAGENT, *argv)
        return proc.wait(), proc.out.read_text() + proc.log.read_text()

    def start_web(self, host: Host) -> Proc:
        argv = (sys.executable, "-B", "-m", "tests.world.web", host.name, str(WEB_PORT))
        return self.procs.start(host, f"web-{host.name}", *argv)

    def until_up(self, *names: str) -> None:
        for name in names:
            backend = self.backends[name]
            consul.until_joined(backend.consul, self.server)
            web = Http((backend.host, backend.host.address, WEB_PORT))
            until(partial(web, "PUT", "/health?status=200"), f"the web server of {name}")

    def register(self, service: str, vip: str, *names: str, **options: Any) -> None:
        """Register the service on these nodes, and wait until Consul calls them healthy."""
        meta = {"lb-vip": vip, **options.pop("meta", {})}
        for name in names:
            self.backends[name].consul.register(service, WEB_PORT, check="/health", meta=meta, **options)
        until(
            lambda: (
                {f"{service}-{name}": "passing" for name in names}.items()
                <= self.server.health(service).items()
            ),
            f"{service} to be healthy on {', '.join(names)}",
        )

    def until_settled(self, service: str) -> None:
        """Wait until no slot is tracked any more: connections made from then on leave no record."""
        until(
            lambda: not any(b["former_slots"] for b in self.edge.backends(service).values()),
            f"{service} to settle",
        )

    def release(self) -> None:
        """Let the downloads that are under way come to their end."""
        for backend in self.backends.values():
            if backend.web.is_running:
                Http((backend.host, backend.host.address, WEB_PORT))("PUT", "/release")

    def until_serving(self, service: str, *names: str) -> None:
        """Wait until exactly these nodes get new connections, and are ready to answer them."""
        until(
            lambda: {n for n, b in self.edge.backends(service).items() if b["slots"]} == set(names),
            f"{service} to be spread over {', '.join(names) or 'nobody'}",
        )
        for vip in self.edge.service(service)["vips"]:
            for name in names:
                until(partial(self.backends[name].has, vip["address"]), f"{name} to have {vip['address']}")

    def traffic(self, what: str, vip: str, path: str = "/", **options: float) -> traffic.Traffic:
        return traffic.start(self.procs, self.client, what, f"http://{vip}{path}", **options)


@contextlib.contextmanager
def lab(backends: dict[str, int] | None = None) -> Iterator[Lab]:
    """The world, with the agent ready and no service yet. backends: name -> last number of the address."""
    backends = {"b1": 21, "b2": 22, "b3": 23} if backends is None else backends
    with net() as made, procs(made.world) as running:
        client = made.add_host("client", 2)
        edge = made.add_host("edge", 10)
        server = consul.start_server(running, made.add_host("consul", 3))
        ip(f"-n {client.namespace} route add {VIPS} via {edge.address}")
        api = running.folder / "lbagent.sock"
        config = running.folder / "lbagent.toml"
        config.write_text(edge_config(made, edge, running.folder, api))
        agent = consul.start_agent(running, edge, server)
        here = Lab(made, running, server, client, Edge(edge, agent, config, Http(api), running))
        for name, number in backends.items():
            here.add_backend(name, number)
        consul.until_joined(agent, server)
        here.until_up(*backends)
        here.edge.start()
        yield here


def edge_config(made: Net, edge: Host, folder: Path, api: Path) -> str:
    """All that an agent has to itself on a machine, it has to itself in its world."""
    return f"""\
[consul]
address = "http://127.0.0.1:{consul.PORT}"

[edge]
interfaces = ["eth0"]
mode = "native"
pin_dir = "{made.pins(edge)}"

[admin]
socket = "{api}"

[state]
directory = "{folder}/edge"
"""


def backend_config(made: Net, host: Host, folder: Path) -> str:
    return f"""\
[consul]
address = "http://127.0.0.1:{consul.PORT}"

[backend]
interfaces = ["eth0"]
mode = "native"
pin_dir = "{made.pins(host)}"

[state]
directory = "{folder}/{host.name}"
"""
