"""A Control without an agent: a report that tests change by hand, and what was asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

from lbagent.core.model import Proto, VipKey
from lbagent.core.status import BackendStatus, DeviceStatus, ServiceStatus, Standing, Status
from lbagent.errors import NotFound

KEYS = tuple(VipKey(IPv4Address("203.0.113.10"), 80, proto) for proto in (Proto.TCP, Proto.UDP))


def backend(id: str, node: str = "node7", **changes: Any) -> BackendStatus:
    made = BackendStatus(
        node=node,
        id=id,
        address="192.0.2.21",
        port=80,
        standing=Standing.PASSING,
        weight=10,
        slots=2048,
        former_slots=0,
        records=0,
        empty=False,
        hop="02:00:00:00:00:21 dev eth0",
        packets=1000,
        bytes=64000,
    )
    return replace(made, **changes)


def service(name: str, *backends: BackendStatus) -> ServiceStatus:
    return ServiceStatus(
        name, KEYS, True, 4096, "0123456789ab", backends, (), packets=9, bytes=900, answer_at=95.0
    )


def status(*services: ServiceStatus) -> Status:
    return Status(
        ready=True,
        version="1.2.3",
        program="abcdef012345",
        adopted=True,
        started_at=10.0,
        applied_at=90.0,
        applies=4,
        apply_errors=1,
        consul_answer_at=95.0,
        consul_errors=2,
        devices=(DeviceStatus("eth0", "native"),),
        services=services,
        drops={"fragment": 7},
        flow_records=3,
    )


class FakeControl:
    """drained: each call. `change` makes a newer report; `waits` is set while somebody waits for one."""

    def __init__(self, now: Status) -> None:
        self.now = now
        self.drained: list[tuple[str, str, str, str]] = []
        self.error: BaseException | None = None
        self.waits = asyncio.Event()
        self._newer = asyncio.Event()

    def status(self) -> Status:
        return self.now

    async def refreshed(self) -> Status:
        return self.now

    async def changed(self, after: Status) -> Status:
        while self.now == after:
            self.waits.set()
            await self._newer.wait()
        return self.now

    async def drain(self, service: str, node: str, id: str, reason: str) -> None:
        self.drained.append((service, node, id, reason))
        self._must_exist(service, node, id)
        self.change(
            service,
            node,
            id,
            standing=Standing.DRAINED,
            slots=0,
            former_slots=2048,
            records=5,
            reason=reason,
            since=100.0,
        )

    async def undrain(self, service: str, node: str, id: str) -> None:
        self._must_exist(service, node, id)
        self.change(
            service, node, id, standing=Standing.PASSING, slots=2048, empty=False, reason="", since=0.0
        )

    def change(self, service: str, node: str, id: str, **changes: Any) -> None:
        """Report this of the backend from now on."""

        def changed(b: BackendStatus) -> BackendStatus:
            return replace(b, **changes) if (b.node, b.id) == (node, id) else b

        self.update(lambda b: (changed(b),), service)

    def remove(self, service: str, node: str, id: str) -> None:
        self.update(lambda b: () if (b.node, b.id) == (node, id) else (b,), service)

    def update(self, become: Callable[[BackendStatus], tuple[BackendStatus, ...]], service: str) -> None:
        services = tuple(
            replace(s, backends=tuple(new for b in s.backends for new in become(b)))
            if s.name == service
            else s
            for s in self.now.services
        )
        self.report(replace(self.now, services=services))

    def report(self, now: Status) -> None:
        self.now = now
        ended, self._newer = self._newer, asyncio.Event()
        self.waits.clear()
        ended.set()

    def _must_exist(self, service: str, node: str, id: str) -> None:
        if self.error is not None:
            raise self.error
        if not any(
            s.name == service and any((b.node, b.id) == (node, id) for b in s.backends)
            for s in self.now.services
        ):
            raise NotFound(f"no {service} {node}/{id}")
