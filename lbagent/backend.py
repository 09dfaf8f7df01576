"""`lbagent backend`: makes a node fit to serve VIPs by direct server return, and takes that back when asked.

While it runs it follows Consul: the VIPs of the instances on this node are on the loopback device, the
decapsulation program runs on the interfaces, the sysctls fit. When it stops all of that stays, and the next
start goes on from there. What to do is decided in core/dsr.py; all that is changed is noted in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol, assert_never

import structlog

from lbagent import links, systemd
from lbagent.alone import alone
from lbagent.config import Config
from lbagent.consul import NodeWatcher
from lbagent.core import dsr
from lbagent.core.dsr import Change, Node, Record
from lbagent.dataplane import abi, libbpf, program
from lbagent.errors import DataplaneError, LbAgentError, LinkError

CONF = Path("/proc/sys/net/ipv4/conf")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAP = "addresses"
ADDRESSES = 4096  # VIPs that a node may serve
RETRY_S = (1.0, 60.0)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """mode: as of links.attach. record: the file that says what was changed."""

    interfaces: frozenset[str]
    loopback: str
    mode: str
    record: Path
    build: program.DecapSettings


def settings_of(config: Config) -> Settings:
    backend = config.backend
    return Settings(
        frozenset(backend.interfaces),
        backend.loopback,
        backend.mode,
        config.state.directory / "backend.json",
        program.DecapSettings(ADDRESSES, backend.pin_dir),
    )


# ---- the record ---------------------------------------------------------------------------------


def load(path: Path) -> Record:
    """What was changed since the machine started: nothing of it outlives that. Raises DataplaneError."""
    try:
        saved = json.loads(path.read_text())
        if saved["boot"] != _boot():
            return Record()
        return Record(
            frozenset(IPv4Address(address) for address in saved["addresses"]),
            {key: Change(int(old), int(new)) for key, (old, new) in saved["sysctls"].items()},
            frozenset(saved["devices"]),
        )
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataplaneError(f"{path}: cannot read what was changed on this node: {error}") from error


def save(path: Path, record: Record) -> None:
    """Atomic, and on the disk when it returns."""
    content = {
        "boot": _boot(),
        "addresses": [str(address) for address in sorted(record.addresses)],
        "sysctls": record.sysctls,
        "devices": sorted(record.devices),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _boot() -> str:
    return BOOT_ID.read_text().strip()


# ---- the node -----------------------------------------------------------------------------------


class Backend:
    """The node, and the record of what was changed on it. Its calls block; one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._record = load(settings.record)
        self._pinned = next(iter(program.find(settings.build)), None)

    @property
    def added(self) -> frozenset[IPv4Address]:
        """VIPs that are on the node because of us."""
        return self._record.addresses

    def serve(self, vips: frozenset[IPv4Address]) -> None:
        """Make the node serve these VIPs and no others of ours. May be repeated after any error."""
        settings = self._settings
        self._pinned = program.ensure(settings.build)
        for action in dsr.plan(self._read(settings.interfaces), self._record, vips, settings.interfaces):
            self._do(action)
        program.retire_others(settings.build, self._pinned)

    def undo(self) -> None:
        """Take back all that was ever changed, and the program with its pins."""
        there = {name for name in self._settings.interfaces if (CONF / name).exists()}
        self._record = replace(self._record, devices=self._record.devices | there)
        for action in dsr.undo(self._read(frozenset()), self._record):
            self._do(action)
        program.remove_all(self._settings.build)
        self._settings.record.unlink(missing_ok=True)
        self._record = Record()

    def _read(self, interfaces: frozenset[str]) -> Node:
        """interfaces: those that are to run the latest program."""
        devices = interfaces | {name for name in self._record.devices if (CONF / name).exists()}
        attached = frozenset(name for name in devices if self._runs_ours(name, latest=name in interfaces))
        addresses = links.addresses(self._settings.loopback)
        sysctls = {key: _sysctl(key) for key in dsr.keys(devices)}
        return Node(frozenset(a.ip for a in addresses), self._told(), sysctls, attached)

    def _runs_ours(self, device: str, latest: bool) -> bool:
        now = links.attached(device)
        if now is None or self._pinned is None:
            return False
        return now[1] == self._pinned.info().id if latest else self._owns(now[1])

    def _owns(self, program_id: int) -> bool:
        return program.owns(self._settings.build, program_id)

    def _told(self) -> frozenset[IPv4Address]:
        if self._pinned is None:
            return frozenset()
        with libbpf.opened(self._pinned.directory / MAP) as fd:
            return frozenset(abi.unpack_address(key) for key in libbpf.map_keys(fd))

    def _tell(self, address: IPv4Address, wanted: bool) -> None:
        assert self._pinned is not None, "there is no map to change"
        with libbpf.opened(self._pinned.directory / MAP) as fd:
            if wanted:
                unused = bytes(abi.sizeof("struct counter") * libbpf.cpus())
                libbpf.map_update(fd, abi.pack_address(address), unused)
            else:
                libbpf.map_delete(fd, abi.pack_address(address))

    def _attach(self, device: str) -> None:
        assert self._pinned is not None, "there is no program to attach"
        with self._pinned.opened() as fd:
            mode = links.attach(device, fd, self._settings.mode, self._owns)
        log.info("attached", device=device, mode=mode, program=self._pinned.digest)

    def _do(self, action: dsr.Action) -> None:
        after = dsr.note(self._record, action)
        takes_back = dsr.takes_back(self._record, action)
        if after != self._record and not takes_back:
            save(self._settings.record, after)
        self._change(action)
        if takes_back:
            save(self._settings.record, after)
        self._record = after

    def _change(self, action: dsr.Action) -> None:
        loopback = self._settings.loopback
        match action:
            case dsr.SetSysctl(key, old, new):
                _set_sysctl(key, new)
                log.info("sysctl_changed", key=f"net.ipv4.conf.{key.replace('/', '.')}", old=old, new=new)
            case dsr.Attach(device):
                self._attach(device)
            case dsr.Detach(device):
                links.detach(device)
                log.info("detached", device=device)
            case dsr.Tell(address):
                self._tell(address, True)
            case dsr.Untell(address):
                self._tell(address, False)
            case dsr.AddAddress(address):
                links.add_address(loopback, address)
                log.info("vip_added", vip=str(address), device=loopback)
            case dsr.DelAddress(address):
                links.del_address(loopback, address)
                log.info("vip_removed", vip=str(address), device=loopback)
            case _:
                assert_never(action)


def _sysctl(key: str) -> int:
    try:
        return int((CONF / key).read_text())
    except OSError as error:
        raise LinkError(f"net.ipv4.conf.{key}: {error.strerror}") from error


def _set_sysctl(key: str, value: int) -> None:
    try:
        (CONF / key).write_text(f"{value}\n")
    except OSError as error:
        raise LinkError(f"net.ipv4.conf.{key}: cannot be set to {value}: {error.strerror}") from error


# ---- following Consul ---------------------------------------------------------------------------


class Serving(Protocol):
    """What Follower needs of a Backend."""

    @property
    def added(self) -> frozenset[IPv4Address]: ...
    def serve(self, vips: frozenset[IPv4Address]) -> None: ...


class Follower:
    """Keeps the node as Consul's last good answer wants it; no answer changes nothing. For one event loop."""

    def __init__(
        self, backend: Serving, linger_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend = backend
        self._linger_s = linger_s
        self._clock = clock
        self._asked: dsr.Asked | None = None  # until the first answer, the VIPs of the run before stay
        self._leases = {vip: dsr.Lease(linger_s, None) for vip in backend.added}
        self._wake = asyncio.Event()

    def emit(self, registrations: Iterable[dsr.Registration]) -> None:
        """These are all opted-in instances on this node."""
        before = self._asked or dsr.Asked({}, {}, {})
        self._asked = dsr.asked(registrations, before.options, self._linger_s)
        for id_, why in self._asked.problems.items():
            if before.problems.get(id_) != why:
                log.warning("registration_refused", id=id_, why=why, kept=id_ in self._asked.options)
        self._wake.set()

    async def serve(self) -> float | None:
        """Bring the node up to date. Returns the seconds until that is due again; None: on news only."""
        if self._asked is not None:
            self._leases = dsr.renew(self._leases, self._asked.vips, self._clock())
        await _finish(asyncio.ensure_future(asyncio.to_thread(self._backend.serve, frozenset(self._leases))))
        end = dsr.next_end(self._leases)
        return None if end is None else max(0.0, end - self._clock())

    async def run(self) -> None:
        """Until cancelled; a change under way is always finished."""
        retry_s = RETRY_S[0]
        while True:
            self._wake.clear()
            try:
                wait_s = await self.serve()
                retry_s = RETRY_S[0]
            except LbAgentError as error:
                log.error("node_not_changed", why=str(error))
                wait_s = retry_s * random.uniform(0.5, 1.0)
                retry_s = min(retry_s * 2, RETRY_S[1])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()


async def _finish(change: asyncio.Future[None]) -> None:
    try:
        await asyncio.shield(change)
    except asyncio.CancelledError:
        await asyncio.wait([change])
        raise


# ---- a run --------------------------------------------------------------------------------------


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, and leave the node serving. Raises LbAgentError when it cannot start."""
    settings = settings_of(config)
    with alone(settings.record.parent, settings.record.stem):
        backend = await asyncio.to_thread(Backend, settings)
        follower = Follower(backend, config.timing.linger)
        await follower.serve()
        watcher = NodeWatcher(config.consul, config.backend.node)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with asyncio.TaskGroup() as tasks:
            under_way = [
                tasks.create_task(follower.run(), name="node"),
                tasks.create_task(watcher.run(follower.emit), name="consul"),
                tasks.create_task(systemd.watchdog(), name="watchdog"),
            ]
            systemd.notify("READY=1")
            log.info("ready", interfaces=sorted(settings.interfaces), vips=sorted(map(str, backend.added)))
            await stop.wait()
            systemd.notify("STOPPING=1")
            for task in under_way:
                task.cancel()
    log.info("stopped", serving="goes on")


def undo(config: Config) -> None:
    """Take back all that was changed on this node. Raises ConfigError while `run` is at it."""
    settings = settings_of(config)
    with alone(settings.record.parent, settings.record.stem):
        Backend(settings).undo()
