"""One world for all end-to-end tests; each test has a service and a VIP of its own in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.world.lab import Lab, lab
from tests.world.procs import until
from tests.world.traffic import Event, Traffic, failed

BACKENDS = {"b1": 21, "b2": 22, "b3": 23, "b4": 24}
_numbers = itertools.count(20)


@dataclass(slots=True)
class Service:
    """A service in the world. What it registers and starts ends with the test."""

    here: Lab
    name: str
    vip: str
    nodes: set[str] = field(default_factory=set)
    running: list[Traffic] = field(default_factory=list)

    def register(self, *nodes: str, meta: dict[str, str] | None = None, **options: Any) -> None:
        self.nodes.update(nodes)
        self.here.register(self.name, self.vip, *nodes, meta=meta or {"lb-settle": "3s"}, **options)

    def serve(self, *nodes: str, **options: Any) -> None:
        """Register on these nodes, and wait until they and only they get new connections."""
        self.register(*nodes, **options)
        self.here.until_serving(self.name, *nodes)

    def settle(self) -> None:
        self.here.until_settled(self.name)

    def until_serving(self, *nodes: str) -> None:
        self.here.until_serving(self.name, *nodes)

    def until_weights(self, weights: dict[str, int]) -> None:
        until(
            lambda: {n: b["weight"] for n, b in self.here.edge.backends(self.name).items()} == weights,
            f"{self.name} to weigh {weights}",
        )

    def backend(self, node: str) -> Any:
        return self.here.edge.backends(self.name)[node]

    def drain(self, node: str, **options: Any) -> Any:
        return self.here.edge.drain(self.name, node, **options)

    def undrain(self, node: str) -> Any:
        return self.here.edge.undrain(self.name, node)

    def traffic(self, what: str, path: str = "/", **options: float) -> Traffic:
        self.running.append(self.here.traffic(what, self.vip, path, **options))
        return self.running[-1]

    def requests(self, count: int = 100) -> list[Event]:
        """New connections, all of which succeed."""
        traffic = self.traffic("requests", count=count)
        traffic.finish()
        events = traffic.events()
        assert len(events) == count
        assert not failed(events)
        return events

    def downloads(self, count: int) -> Traffic:
        """Downloads that last until `self.here.release()`."""
        traffic = self.traffic("downloads", "/download?rate=20000", count=count)
        traffic.until_begun(count)
        return traffic

    def end(self) -> None:
        for traffic in self.running:
            traffic.proc.stop()
        for node in self.nodes:
            self.here.backends[node].consul.deregister(f"{self.name}-{node}")


@pytest.fixture(scope="session")
def world() -> Iterator[Lab]:
    with lab(BACKENDS) as here:
        yield here


@pytest.fixture
def here(world: Lab) -> Lab:
    """The world, whole again whatever the test before did to it."""
    for backend in world.backends.values():
        if not backend.web.is_running:
            backend.web = world.start_web(backend.host)
    world.until_up(*world.backends)
    if world.edge.agent is None or not world.edge.agent.is_running:
        world.edge.start()
    return world


@pytest.fixture
def service(here: Lab) -> Iterator[Service]:
    number = next(_numbers)
    made = Service(here, f"web{number}", f"203.0.113.{number}")
    try:
        yield made
    finally:
        made.end()
