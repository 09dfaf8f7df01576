"""The agent of an edge node: wires the edges to the reconciler and is the operator's counterpart.

A run is: find or build the program, attach it, read what is live, then follow events until a signal. SIGTERM
ends the process and leaves packets flowing. SIGHUP reads the configuration again and starts the run anew in
the same process, which adopts like any start; what cannot be served is told, and the one before goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib.metadata
import os
import signal
import socket
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from lbagent import admin, links, logs, systemd
from lbagent.alone import alone
from lbagent.config import Config, load
from lbagent.consul import Watcher
from lbagent.core.desired import Defaults
from lbagent.core.model import Capacity
from lbagent.core.report import Measured, report
from lbagent.core.state import Drained, HopsChanged, IntentsLoaded, State, Undrained
from lbagent.core.status import DeviceStatus, ServiceStatus, Status
from lbagent.dataplane import Dataplane, program
from lbagent.dataplane.fake import Fake
from lbagent.dataplane.kernel import Kernel
from lbagent.errors import ConfigError, LbAgentError, LinkError, NotFound, leaves
from lbagent.intents import Intents
from lbagent.reconciler import Pass, Reconciler

APPLY_DEADLINE_S = 30.0  # what an operator asks for is in the kernel by then, or answered with an error
VERSION = importlib.metadata.version("lbagent")

T = TypeVar("T")

log = structlog.get_logger()


class End(enum.Enum):
    """Why a run ended."""

    STOP = "stop"
    RELOAD = "reload"


@dataclass(frozen=True, slots=True)
class Ground:
    """What a run stands on. devices: name -> mode."""

    dataplane: Dataplane
    digest: str
    adopted: bool
    devices: dict[str, str]
    started_at: float


class Agent:
    """The Control of the admin API: reports what the reconciler did, and hands it what operators want."""

    def __init__(self, reconciler: Reconciler, intents: Intents, ground: Ground) -> None:
        self._reconciler = reconciler
        self._intents = intents
        self._ground = ground
        self._keeping = asyncio.Lock()
        self._reported: tuple[Pass | None, State, Status] | None = None

    def status(self) -> Status:
        """Made once for each pass and state, however often it is asked for."""
        last, state = self._reconciler.last, self._reconciler.state
        if self._reported is None or self._reported[0] is not last or self._reported[1] is not state:
            self._reported = last, state, self._report(last, state)
        return self._reported[2]

    async def refreshed(self) -> Status:
        async with asyncio.timeout(APPLY_DEADLINE_S):
            await self._reconciler.refreshed()
        return self.status()

    async def changed(self, after: Status) -> Status:
        while (now := self.status()) is after:
            await self._reconciler.next_pass()
        return now

    async def drain(self, service: str, node: str, id: str, reason: str) -> None:
        """Draining again changes the reason; it has been drained since the first time."""
        self._must_exist(service, node, id)
        before = self._reconciler.state.drains.get((service, node, id))
        since = before.since if before else time.time()
        await self._intend(Drained(service, node, id, reason, since))

    async def undrain(self, service: str, node: str, id: str) -> None:
        if (service, node, id) not in self._reconciler.state.drains:
            self._must_exist(service, node, id)
        await self._intend(Undrained(service, node, id))

    async def _intend(self, event: Drained | Undrained) -> None:
        """Keep it on disk, then let the kernel have it. The lock keeps file and state in one order."""
        async with self._keeping, asyncio.timeout(APPLY_DEADLINE_S):
            drains = dict(self._reconciler.state.drains)
            key = (event.service, event.node, event.id)
            drains.pop(key, None)
            if isinstance(event, Drained):
                drains[key] = event
            await asyncio.to_thread(self._intents.save, tuple(drains.values()))
            self._reconciler.emit(event)
            await self._reconciler.settled()
        log.info(type(event).__name__.lower(), service=event.service, node=event.node, id=event.id)

    def _must_exist(self, service: str, node: str, id: str) -> None:
        known = self._reconciler.state.services
        if service not in known:
            raise NotFound(f"no service {service}; there are: {', '.join(sorted(known)) or 'none'}")
        instances = [i.key for i in known[service].instances]
        if (node, id) not in instances:
            names = ", ".join(f"{n}/{i}" for n, i in instances)
            raise NotFound(f"service {service} has no backend {node}/{id}; there are: {names or 'none'}")

    def _report(self, last: Pass | None, state: State) -> Status:
        tally, ground = self._reconciler.tally, self._ground
        services: tuple[ServiceStatus, ...] = ()
        drops: dict[str, int] = {}
        records = 0
        problems = [tally.problem] if tally.problem else []
        if last is not None:
            devices = dict(socket.if_nameindex())
            measured = Measured(last.records, last.counters.vips, last.counters.reals, devices)
            services = report(last.desired, last.live, measured, self._reconciler.seed)
            drops, records = dict(last.counters.drops), last.flows
            problems += last.desired.problems
        return Status(
            ready=last is not None and last.full and not tally.problem,
            version=VERSION,
            program=ground.digest,
            adopted=ground.adopted,
            started_at=ground.started_at,
            applied_at=tally.applied_at,
            applies=tally.applies,
            apply_errors=tally.errors,
            consul_answer_at=state.answer_at,
            consul_errors=state.errors,
            devices=tuple(DeviceStatus(name, mode) for name, mode in ground.devices.items()),
            services=services,
            drops=drops,
            flow_records=records,
            problems=tuple(problems),
        )


# ---- a run --------------------------------------------------------------------------------------


async def run(path: Path, dry_run: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. Raises LbAgentError when it cannot start; an error later ends the
    process, as systemd starts it again while packets flow on."""
    config = load(path, os.environ)
    good: Config | None = None  # the one that served, to go back to
    with _signals() as ends:
        while True:
            try:
                if await _serve(config, dry_run, ends) is End.STOP:
                    break
            except (LbAgentError, BaseExceptionGroup) as error:
                why = list(leaves(error))
                if good is None or not all(isinstance(e, LbAgentError) for e in why):
                    raise
                log.error("configuration_refused", why="; ".join(map(str, why)), kept="the one before")
                config, good = good, None
            else:
                systemd.notify("RELOADING=1")
                config, good = _read_again(path, config), config
    systemd.notify("STOPPING=1")
    log.info("stopped", forwarding="goes on")


def _read_again(path: Path, config: Config) -> Config:
    """What the file says now, or the same as before if that makes no sense."""
    try:
        config = load(path, os.environ)
    except ConfigError as error:
        log.error("configuration_refused", why=str(error), kept="the one before")
    else:
        log.info("configuration_read", path=str(path))
    return config


async def _serve(config: Config, dry_run: bool, ends: asyncio.Queue[End]) -> End:
    started_at = time.time()
    logs.setup(config.log.level, config.log.format)
    intents = Intents(config.state.directory / "intents.json")
    drains = intents.load()
    with alone(config.state.directory, "edge"), contextlib.ExitStack() as undo:
        ground = await asyncio.to_thread(_prepare, config, dry_run, started_at, undo)
        state = State()
        defaults = Defaults(config.timing.settle, config.timing.linger)
        reconciler = Reconciler(ground.dataplane, state, defaults, config.edge.seed)
        reconciler.emit(IntentsLoaded(drains))
        hops = links.NextHops()
        loop = asyncio.get_running_loop()
        hops_failed: asyncio.Future[None] = loop.create_future()
        undo.callback(hops.stop)
        hops.start(
            lambda changed: _soon(loop, reconciler.emit, HopsChanged(changed)),
            lambda error: _soon(loop, hops_failed.set_exception, error),
        )
        agent = Agent(reconciler, intents, ground)
        async with asyncio.TaskGroup() as tasks:
            under_way = [
                tasks.create_task(reconciler.run(), name="reconciler"),
                tasks.create_task(Watcher(config.consul).run(reconciler.emit), name="consul"),
                tasks.create_task(_follow_backends(reconciler, hops), name="hops"),
                tasks.create_task(admin.serve(config.admin, agent), name="admin"),
                tasks.create_task(systemd.watchdog(), name="watchdog"),
                tasks.create_task(_announce_ready(reconciler), name="ready"),
                tasks.create_task(_raise(hops_failed), name="hops failure"),
            ]
            try:
                return await ends.get()
            finally:
                for task in under_way:
                    task.cancel()


def _prepare(config: Config, dry_run: bool, started_at: float, undo: contextlib.ExitStack) -> Ground:
    """Program, maps and devices. May take a second when the program must be compiled."""
    if dry_run:
        return Ground(
            Fake(_build(config).capacity),
            "dry-run",
            False,
            dict.fromkeys(config.edge.interfaces, "detached"),
            started_at,
        )
    build = _build(config)
    ours = {pinned.info().id for pinned in program.find(build)}
    pinned = program.ensure(build)
    kernel = undo.enter_context(Kernel(pinned.directory))
    ours.add(pinned.info().id)
    devices = {}
    with pinned.opened() as fd:
        for name in config.edge.interfaces:
            devices[name] = links.attach(name, fd, config.edge.mode, ours.__contains__)
    _leave(ours, set(devices))
    program.retire_others(build, pinned)
    log.info("attached", program=pinned.digest, adopted=pinned.adopted, devices=devices)
    return Ground(kernel, pinned.digest, pinned.adopted, devices, started_at)


def _build(config: Config) -> program.Settings:
    capacity = Capacity(config.edge.vips, config.edge.reals, config.edge.flows)
    return program.Settings(capacity, config.edge.seed, config.edge.encap_source, config.edge.pin_dir)


async def _follow_backends(reconciler: Reconciler, hops: links.NextHops) -> None:
    """Ask for the way to each address that is wanted, and to no other."""
    wanted: frozenset[object] | None = None
    while True:
        turn = await reconciler.next_pass()
        addresses = frozenset(b.address for vip in turn.desired.want.vips for b in vip.backends)
        if addresses != wanted:
            wanted = addresses
            hops.want(addresses)


async def _announce_ready(reconciler: Reconciler) -> None:
    """Ready for systemd is: attached, and what was live is taken over. Consul may be down for hours."""
    await reconciler.settled()
    systemd.notify("READY=1")
    while not (turn := await reconciler.next_pass()).full:
        pass
    log.info("ready", vips=len(turn.live.vips))


async def _raise(failed: asyncio.Future[None]) -> None:
    """What went wrong on another thread ends the run like an error in a task."""
    await failed


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], what: T) -> None:
    """From another thread."""
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(call, what)


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Queue[End]]:
    """What signals ask for, in order, also between two runs."""
    ends: asyncio.Queue[End] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    meanings = {signal.SIGTERM: End.STOP, signal.SIGINT: End.STOP, signal.SIGHUP: End.RELOAD}
    for number, meaning in meanings.items():
        loop.add_signal_handler(number, ends.put_nowait, meaning)
    try:
        yield ends
    finally:
        for number in meanings:
            loop.remove_signal_handler(number)


def detach(config: Config) -> None:
    """Take all away: our program from every device, and all pins. Packets then pass untouched."""
    build = _build(config)
    _leave({pinned.info().id for pinned in program.find(build)}, ())
    program.remove_all(build)


def _leave(ours: Container[int], kept: Container[str]) -> None:
    """Take our programs from all devices but those."""
    for _, name in socket.if_nameindex():
        if name in kept:
            continue
        try:
            now = links.attached(name)
            if now is not None and now[1] in ours:
                links.detach(name)
                log.info("detached", device=name)
        except LinkError as error:
            log.warning("device_skipped", device=name, why=str(error))
