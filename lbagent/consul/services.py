"""All opted-in services: one watch on the list of services, and one on the health of each.

An answer that leaves a service without instances is believed only when the list and the service's health
agree on it in consistent reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from lbagent.consul.client import Access, Answer, Connect, Reader, blocking, connect, read, read_consistent
from lbagent.consul.watch import CONFIRM_S, Pace, watch
from lbagent.consul.words import Catalog, Entry, catalog_of, decode, instance
from lbagent.core.instances import Instance
from lbagent.core.model import UNNAMED
from lbagent.core.state import CatalogAnswered, ConsulFailed, Event, ServiceAnswered
from lbagent.errors import ConsulError

CATALOG_PATH = "/v1/catalog/services"
TURN_S, BRIEF_S = 2, 30

Emit = Callable[[Event], None]

log = structlog.get_logger()


@dataclass(slots=True)
class _Watched:
    """A service that is watched. instances: as last believed, None before the first answer."""

    task: asyncio.Task[None] | None = None
    instances: tuple[Instance, ...] | None = None


@dataclass(slots=True)
class Watcher:
    """Follows the list of services, and the health of each that is opted in."""

    access: Access
    pace: Pace = field(default_factory=Pace)
    connect: Connect = connect

    async def run(self, emit: Emit) -> None:
        """Until cancelled. Raises ConfigError if there is no way to ask at all."""
        async with self.connect(self.access) as reader, asyncio.TaskGroup() as tasks:
            await _Services(self.access, self.pace, reader, tasks, emit).follow()


@dataclass(slots=True)
class _Services:
    access: Access
    pace: Pace
    reader: Reader
    tasks: asyncio.TaskGroup
    emit: Emit
    watched: dict[str, _Watched] = field(default_factory=dict)

    async def follow(self) -> None:
        await watch(
            lambda index: read(self.reader, CATALOG_PATH, index, self._wait_s()),
            self._take_catalog,
            lambda error: self.emit(ConsulFailed(None, error, self.pace.now())),
            self.pace,
            "catalogue",
        )

    async def _take_catalog(self, answer: Answer) -> bool:
        listed = self._listed(catalog_of(answer))
        fresh, missing = listed - self.watched.keys(), self.watched.keys() - listed
        for name in sorted(fresh):
            self.watched[name] = _Watched()
            watch_it = self._follow_service(name)
            self.watched[name].task = self.tasks.create_task(watch_it, name=f"consul {name}")
        if fresh:
            self._warn_if_crowded()
        doubts: dict[str, str] = {}
        if answer.filtered:
            doubts = dict.fromkeys(missing, "is not listed, but the list is filtered by ACLs")
        elif unsure := {name for name in missing if self.watched[name].instances != ()}:
            doubts = await self._doubts(unsure)
        for name in sorted(missing - doubts.keys()):
            self._leave(name)
        self.emit(CatalogAnswered(listed | doubts.keys(), self.pace.now()))
        if doubts:
            raise ConsulError("; ".join(f"{name} {why}" for name, why in sorted(doubts.items())))
        return bool(fresh or missing)

    def _leave(self, name: str) -> None:
        gone = self.watched.pop(name)
        if gone.task is not None:
            gone.task.cancel()
        self.emit(ServiceAnswered(name, (), self.pace.now()))

    async def _follow_service(self, name: str) -> None:
        path = _health_path(name)
        await watch(
            lambda index: read(self.reader, path, index, self._wait_s()),
            lambda answer: self._take_health(name, answer),
            lambda error: self.emit(ConsulFailed(name, error, self.pace.now())),
            self.pace,
            name,
        )

    async def _take_health(self, name: str, answer: Answer) -> bool:
        watched = self.watched[name]
        instances = self._opted_in(decode(answer, tuple[Entry, ...]))
        before = watched.instances
        if answer.filtered and before and len(instances) < len(before):
            raise ConsulError("fewer instances, but the answer is filtered by ACLs")
        if not instances and before != () and (doubts := await self._doubts({name})):
            raise ConsulError(f"no instances: {name} {doubts[name]}")
        news = instances != before
        if news:
            watched.instances = instances
        self.emit(ServiceAnswered(name, watched.instances or (), self.pace.now()))
        return news

    async def _doubts(self, names: Iterable[str]) -> dict[str, str]:
        """Which of these may still have opted-in instances, and why: consistent reads of list and health must
        agree that there are none."""
        await self.pace.sleep(CONFIRM_S)
        catalog = catalog_of(await read_consistent(self.reader, CATALOG_PATH))
        found: dict[str, str] = {}
        for name in sorted(names):
            try:
                answer = await read_consistent(self.reader, _health_path(name))
                entries = decode(answer, tuple[Entry, ...])
            except ConsulError as error:
                found[name] = f"cannot be confirmed: {error}"
                continue
            if self.access.tag in catalog.get(name, ()) or self._opted_in(entries):
                found[name] = "has instances in another answer"
            elif (name in catalog) != bool(entries):
                found[name] = "is there by one answer and not by another"
            elif answer.filtered:
                found[name] = "may have instances that ACLs filter away"
        return found

    def _opted_in(self, entries: Iterable[Entry]) -> tuple[Instance, ...]:
        found = (instance(entry) for entry in entries if self.access.tag in (entry.service.tags or ()))
        return tuple(sorted(found, key=lambda i: i.key))

    def _listed(self, catalog: Catalog) -> frozenset[str]:
        """A name that begins like those we make up is nobody's."""
        return frozenset(
            n for n, tags in catalog.items() if self.access.tag in tags and not n.startswith(UNNAMED)
        )

    def _wait_s(self) -> int:
        """Watches that outnumber the connections take turns: then, and when that is near, they are short."""
        watches, room = len(self.watched) + 1, blocking(self.access)
        if watches > room:
            return min(self.access.wait, TURN_S)
        return self.access.wait if watches <= room / 2 else min(self.access.wait, BRIEF_S)

    def _warn_if_crowded(self) -> None:
        watches, room = len(self.watched) + 1, blocking(self.access)
        if watches > room:
            log.warning(
                "too_few_connections",
                watches=watches,
                at_once=room,
                effect="changes are seen late",
                remedy="raise limits.http_max_conns_per_client of Consul's agent, then consul.connections",
            )


def _health_path(name: str) -> str:
    return f"/v1/health/service/{name}"
