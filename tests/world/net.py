"""Hosts: network namespaces with one interface each, on one bridge. Makes them and takes them away again.

    client ---+
    edge -----+--- bridge (a namespace of its own)
    backend --+

Every end has its TX checksum offload off: a veth hands frames over with the checksum still to be done,
and a program that encapsulates or answers them would put that gap on the wire. The bridge's ends carry an
XDP program that passes everything, without which the kernel refuses what a host sends back by XDP_TX.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import string
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

BRIDGE = "bridge"
SUBNET = "10.77.0"
PREFIX = 24
NETNS = Path("/run/netns")
BPFFS = Path("/sys/fs/bpf")

_worlds = (f"lb{os.getpid()}{letter}" for letter in itertools.cycle(string.ascii_lowercase))


class WorldError(Exception):
    """The small world could not be built, or did not become what was waited for."""


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with eth0 on the bridge: `name` for us (edge), `namespace` for the kernel (lb123a-edge)."""

    name: str
    namespace: str
    address: str

    @property
    def path(self) -> Path:
        return NETNS / self.namespace

    @property
    def enter(self) -> tuple[str, ...]:
        """Command prefix. Not `ip netns exec`: its fresh /sys would hide bpffs."""
        return ("nsenter", f"--net={self.path}")

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` inside this namespace, on a thread that ends with it."""
        result: list[T] = []
        error: list[BaseException] = []

        def enter_and_work() -> None:
            try:
                with self.path.open() as namespace:
                    if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns", str(self.path))
                result.append(work())
            except BaseException as e:  # noqa: BLE001 - handed to the caller below
                error.append(e)

        thread = threading.Thread(target=enter_and_work, name=self.namespace)
        thread.start()
        thread.join()
        if error:
            raise error[0]
        return result[0]

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """A socket stays in the namespace it was made in, whoever uses it."""
        return self.call(lambda: socket.socket(socket.AF_INET, kind))

    def sysctl(self, key: str, value: str | None = None) -> str:
        """Read, or write and read, /proc/sys/net/<key> of this namespace."""
        file = Path("/proc/sys/net", key)

        def read_or_write() -> str:
            if value is not None:
                file.write_text(value)
            return file.read_text().strip()

        return self.call(read_or_write)


@dataclass(slots=True)
class Net:
    """The hosts of one world, by name. Made by `net()`, which also undoes it."""

    world: str
    hosts: dict[str, Host] = field(default_factory=dict)
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def add_host(self, name: str, number: int, mtu: int = 1500) -> Host:
        """A host with address 10.77.0.<number> on the bridge."""
        host = self._add_namespace(name, f"{SUBNET}.{number}")
        bridge = self.hosts[BRIDGE]
        ip(f"-n {bridge.namespace} link add {name} type veth peer name eth0 netns {host.namespace}")
        for end, device in ((bridge, name), (host, "eth0")):
            run(*end.enter, "ethtool", "-K", device, "tx", "off")
            ip(f"-n {end.namespace} link set {device} mtu {mtu} up")
        bridge.call(lambda: _attach_xdp_pass(socket.if_nametoindex(name)))
        ip(f"-n {bridge.namespace} link set {name} master br0")
        ip(f"-n {host.namespace} addr add {host.address}/{PREFIX} dev eth0")
        return host

    def pins(self, host: Host) -> Path:
        """A place in bpffs for this host's agent alone."""
        return BPFFS / self.world / host.name

    def programs(self, *hosts: Host) -> set[int]:
        """The ids of the XDP programs attached on these hosts, or in the whole world."""
        there = hosts or self.hosts.values()
        links = [json.loads(ip(f"-n {host.namespace} -json link show")) for host in there]
        return {link["xdp"]["prog"]["id"] for devices in links for link in devices if "xdp" in link}

    def _add_namespace(self, name: str, address: str = "") -> Host:
        host = Host(name, f"{self.world}-{name}", address)
        self._undo.callback(_delete_namespace, host.namespace)  # before it exists: half-made ones go, too
        ip(f"netns add {host.namespace}")
        host.sysctl("ipv6/conf/all/disable_ipv6", "1")
        ip(f"-n {host.namespace} link set lo up")
        self.hosts[name] = host
        return host


@contextlib.contextmanager
def net() -> Iterator[Net]:
    """An empty world with its bridge. Leaves nothing behind, however far it came."""
    sweep()
    made = Net(next(_worlds))
    made._undo.callback(_remove_pins, BPFFS / made.world)
    try:
        bridge = made._add_namespace(BRIDGE)
        ip(f"-n {bridge.namespace} link add br0 type bridge forward_delay 0 mcast_snooping 0")
        ip(f"-n {bridge.namespace} link set br0 up")
        yield made
    finally:
        with undisturbed():
            made._undo.close()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No signal stops what is being cleaned up."""
    before = {
        sig: signal.signal(sig, signal.SIG_IGN) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def sweep() -> None:
    """Take away what worlds left behind whose process was killed before it could."""
    for place, remove in ((NETNS, lambda p: _delete_namespace(p.name)), (BPFFS, _remove_pins)):
        for path in place.glob("lb[0-9]*"):
            owner = re.match(r"lb(\d+)[a-z](-|$)", path.name)
            if owner and not Path("/proc", owner[1]).exists():
                remove(path)


def run(*argv: str) -> str:
    """In a session of its own: Ctrl-C at the terminal is for us, who then undo things with such commands."""
    done = subprocess.run(
        argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True, check=False
    )
    if done.returncode != 0:
        raise WorldError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def ip(words: str) -> str:
    return run("ip", *words.split())


def _delete_namespace(namespace: str) -> None:
    if (NETNS / namespace).exists():
        ip(f"netns del {namespace}")


def _remove_pins(place: Path) -> None:
    """bpffs has no `rm -r` that knows of nothing else: bottom up, files, then folders."""
    if place.is_dir():
        for path in sorted(place.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        place.rmdir()


_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _attach_xdp_pass(ifindex: int) -> None:
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    xdp, native = 6, 1 << 2  # BPF_PROG_TYPE_XDP, XDP_FLAGS_DRV_MODE
    code = struct.pack("<BBhi", 0xB7, 0, 0, 2) + struct.pack("<BBhi", 0x95, 0, 0, 0)  # return XDP_PASS
    program = libbpf.bpf_prog_load(xdp, b"pass", b"GPL", code, ctypes.c_size_t(2), None)
    if program < 0:
        raise WorldError(f"loading an XDP program: {os.strerror(-program)}")
    try:
        error = libbpf.bpf_xdp_attach(ifindex, program, native, None)
        if error < 0:
            raise WorldError(f"attaching an XDP program: {os.strerror(-error)}")
    finally:
        os.close(program)
