"""A real Consul: one server, and an agent on each host that registers or asks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode

from tests.world.http import Http
from tests.world.net import Host, WorldError
from tests.world.procs import ROOT, Proc, Procs, until

PORT = 8500
CHECK_S = 1


def binary() -> str:
    """The one on PATH, else the one that contrib/setup.sh fetched."""
    for found in (shutil.which("consul"), shutil.which("consul", path=ROOT / ".cache/consul/usr/bin")):
        if found:
            return found
    raise WorldError("no consul on PATH; run: sudo make setup")


@dataclass(slots=True)
class Agent:
    """Consul's agent on one host; a node of Consul is named like its host."""

    host: Host
    proc: Proc
    http: Http

    def put(self, path: str, body: object = None, **query: str | int) -> Any:
        return self.http("PUT", f"/v1/{path}" + (f"?{urlencode(query)}" if query else ""), body)

    def get(self, path: str, **query: str | int) -> Any:
        return self.http("GET", f"/v1/{path}" + (f"?{urlencode(query)}" if query else ""))

    def register(
        self,
        name: str,
        port: int,
        *,
        id: str = "",
        tags: Sequence[str] = ("lb",),
        meta: dict[str, str] | None = None,
        weight: int = 1,
        warning_weight: int = 1,
        check: str = "/",
    ) -> str:
        """Register an instance on this node, or change it. Its check asks for `check` every second."""
        id = id or f"{name}-{self.host.name}"
        self.put(
            "agent/service/register",
            {
                "Name": name,
                "ID": id,
                "Port": port,
                "Address": self.host.address,
                "Tags": list(tags),
                "Meta": meta or {},
                "Weights": {"Passing": weight, "Warning": warning_weight},
                "Check": {
                    "CheckID": f"check:{id}",
                    "HTTP": f"http://{self.host.address}:{port}{check}",
                    "Interval": f"{CHECK_S}s",
                    "Timeout": "1s",
                },
            },
        )
        return id

    def deregister(self, id: str) -> None:
        self.put(f"agent/service/deregister/{quote(id)}")

    def maintenance(self, id: str, enable: bool) -> None:
        self.put(f"agent/service/maintenance/{quote(id)}", enable=str(enable).lower())

    def health(self, service: str) -> dict[str, str]:
        """id -> passing, warning or critical: the worst of its checks, as Consul's servers know them."""
        order = ("passing", "warning", "critical")
        return {
            entry["Service"]["ID"]: max((check["Status"] for check in entry["Checks"]), key=order.index)
            for entry in self.get(f"health/service/{quote(service)}")
        }

    def until_health(self, service: str, want: dict[str, str]) -> None:
        until(lambda: self.health(service) == want, f"{service} to be {want} in Consul")


def start_server(procs: Procs, host: Host) -> Agent:
    """A lone server. Ready when it leads and answers from its catalogue."""
    alone = {"server": True, "bootstrap_expect": 1, "performance": {"raft_multiplier": 1}}
    agent = _start(procs, host, alone)
    until(lambda: agent.get("catalog/node/" + host.name), "Consul's server to lead")
    return agent


def start_agent(procs: Procs, host: Host, server: Agent) -> Agent:
    """An agent that joins the server. Use `until_joined` before counting on it."""
    return _start(procs, host, {"retry_join": [server.host.address], "retry_interval": "1s"})


def until_joined(agent: Agent, server: Agent) -> None:
    name = agent.host.name
    for asked in (agent, server):
        until(partial(asked.get, f"health/node/{name}"), f"{name} to join Consul")


def _start(procs: Procs, host: Host, special: dict[str, object]) -> Agent:
    folder = procs.folder / f"consul-{host.name}"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(
        json.dumps(
            {
                "node_name": host.name,
                "data_dir": str(folder),
                "bind_addr": host.address,
                "client_addr": f"127.0.0.1 {host.address}",
                "disable_update_check": True,
                "leave_on_terminate": False,
                "ports": {"dns": -1, "grpc": -1},
                "log_level": "warn",
                **special,
            }
        )
    )
    return Agent(host, _run(procs, host), Http((host, "127.0.0.1", PORT)))


def restart(procs: Procs, agent: Agent) -> None:
    """Start one that was stopped; it finds its data where it left it."""
    agent.proc = _run(procs, agent.host)


def _run(procs: Procs, host: Host) -> Proc:
    config = procs.folder / f"consul-{host.name}" / "config.json"
    argv = (binary(), "agent", f"-config-file={config}")
    return procs.start(host, f"consul-{host.name}", *argv, env={"GOMAXPROCS": "2"})
