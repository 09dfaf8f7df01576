"""What a packet costs under live traffic, in multiples of the floor: growing its head by one IP header.

    python -m tests.bench.cost [rounds]

The kernel itself runs a source of frames (BPF_F_TEST_XDP_LIVE_FRAMES) that redirects into one end of a veth;
the program under test has the other end in native mode, and what it sends back is dropped at the first. The
cost is the kernel's own run time by number of runs, less that of a program that does nothing. Timing plain
test runs would not do: the second run sees the packet that the first one encapsulated.

All cases and both calibrations take turns, so that what else the machine does hits them alike; each figure is
the median over the rounds. Every case runs once for the caches before it is measured. The veths are in a
network namespace that ends with this process.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from socket import if_nametoindex

import structlog
from cffi import FFI

from lbagent.core.model import Capacity, Hop
from lbagent.core.ring import ring_bits
from lbagent.dataplane import libbpf, sources
from tests.loaded import VIP, Loaded, loaded, u32, word

os.environ["BCC_KERNEL_SOURCE"] = str(sources.folder())

from bcc import BPF

FRAME_BYTES = 128
FRAMES = 50_000  # of one case in one round: short, so that a round sees one mood of the machine
ROUNDS = 40
CAPACITY = Capacity(vips=256, reals=4096, flows=1 << 18)
CLIENT = IPv4Address("10.64.0.0")

ffi = FFI()
ffi.cdef("""
int unshare(int flags);
int bpf_xdp_attach(int ifindex, int prog_fd, uint32_t flags, const void *opts);
""")
NEW_NETWORK, NATIVE = 0x40000000, 1 << 2  # CLONE_NEWNET, XDP_FLAGS_DRV_MODE


@dataclass(frozen=True)
class Case:
    """kind: ack, syn or udp. goal: multiples of the floor, None if it is only for information."""

    name: str
    kind: str
    flows: int
    goal: float | None
    port: int = 80


CASES = [
    Case("tcp ack, 1 flow", "ack", 1, 4.5),
    Case("tcp ack, 90000 flows", "ack", 90_000, 4.5),
    Case("tcp ack, 500000 flows", "ack", 500_000, 4.5),
    Case("tcp syn, 90000 flows", "syn", 90_000, 4.5),
    Case("udp tracked, 90000 flows", "udp", 90_000, 11),
    Case("not for a vip", "ack", 90_000, 2, port=81),
    Case("tcp ack, 90000 flows, slots tracked", "ack", 90_000, None, port=82),
    Case("tcp ack, 90000 flows, 100 backends", "ack", 90_000, 4.5, port=83),
    Case("tcp ack, 500000 flows, 100 backends", "ack", 500_000, 4.5, port=83),
    Case("tcp syn, 90000 flows, 100 backends", "syn", 90_000, 4.5, port=83),
]


def frame(case: Case) -> bytes:
    proto, flags = (17, 0) if case.kind == "udp" else (6, 0x02 if case.kind == "syn" else 0x10)
    length = (FRAME_BYTES - 14).to_bytes(2, "big")
    ip = b"\x45\0" + length + b"\0\1\x40\0\x40" + bytes([proto]) + bytes(2) + CLIENT.packed + VIP.packed
    ports = (1024).to_bytes(2, "big") + case.port.to_bytes(2, "big")
    l4 = bytes(8) + bytes([0x50, flags]) + bytes(6)
    if proto == 17:
        l4 = (FRAME_BYTES - 34).to_bytes(2, "big") + bytes(2)
    return (b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x08\0" + ip + ports + l4).ljust(FRAME_BYTES, b"\0")


class Wires:
    """A veth for each program, in a namespace of their own: so programs take turns without being attached."""

    def __init__(self) -> None:
        self._libc, self._libbpf = ffi.dlopen(None), ffi.dlopen("libbpf.so.1")
        if self._libc.unshare(NEW_NETWORK) != 0:  # type: ignore[attr-defined]  # cdef declares it
            sys.exit("cannot make a network namespace: root is needed")
        for name in ("all", "default"):  # IPv6 speaks up by itself on a new device
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        traffic = Path(__file__).with_name("traffic.bpf.c")
        self._module = BPF(text=traffic.read_bytes(), cflags=[f"-I{sources.folder()}"])
        self._source, self._sink = self._load("source"), self._load("sink")
        self._near: dict[int, int] = {}
        self.nothing, self.floor = self._load("nothing"), self._load("floor_encap")
        self.add(self.nothing)
        self.add(self.floor)

    def add(self, program: int) -> int:
        """Give the program a veth. Returns the index of the end that it has."""
        near, far = f"near{len(self._near)}", f"far{len(self._near)}"
        for command in (
            f"link add {near} type veth peer name {far}",
            f"link set {near} up",
            f"link set {far} up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        self._attach(near, self._sink)
        self._attach(far, program)
        self._near[program] = if_nametoindex(near)
        return if_nametoindex(far)

    def cost(self, program: int, case: Case) -> float:
        """Nanoseconds a run."""
        self.aim(program, case)
        self.send(case, FRAMES)
        before = libbpf.run_stats(program)
        self.send(case, FRAMES)
        after = self._settled(program)
        return (after[0] - before[0]) / (after[1] - before[1])

    def settled_runs(self, program: int) -> int:
        """How often it ran, once no frame is on its way any more."""
        return self._settled(program)[1]

    def _settled(self, program: int) -> tuple[int, int]:
        before = None
        while (now := libbpf.run_stats(program)) != before:
            before = now
            time.sleep(0.0005)
        return now

    def aim(self, program: int, case: Case) -> None:
        """From now on, frames of this case meet this program."""
        source = u32(self._near[program]) + u32(case.flows) + frame(case)
        libbpf.map_update(self._module[b"source_of"].map_fd, u32(0), source)

    def send(self, case: Case, frames: int) -> None:
        libbpf.prog_run_live(self._source, frame(case), frames)

    def _load(self, name: str) -> int:
        return self._module.load_func(name.encode(), BPF.XDP).fd

    def _attach(self, device: str, program: int) -> None:
        attach = self._libbpf.bpf_xdp_attach  # type: ignore[attr-defined]  # cdef declares it
        if attach(if_nametoindex(device), program, NATIVE, ffi.NULL) < 0:
            sys.exit(f"cannot attach an XDP program to {device}")


def fill(balancer: Loaded, far: int) -> None:
    """VIPs whose backends are all behind the same wire. Port 80 has 10, as has port 82, whose slots are
    all tracked; port 83 has 100, so its ring is four times as big."""
    rng = random.Random(1)
    for number in range(1, 101):
        balancer.put_real(number, hop=Hop(b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2", far, 1500))
    for vip, (port, backends, tracked) in enumerate(((80, 10, False), (82, 10, True), (83, 100, False))):
        bits = ring_bits(backends)
        slots = {n: word(rng.randint(1, backends), tracked=tracked) for n in range(1 << bits)}
        balancer.put_ring(0, vip, bits=bits, others=slots)
        balancer.put_vip(vip, VIP, port, bits=bits)


def measure(rounds: int) -> Iterator[dict[str, object]]:
    started = time.monotonic()
    with loaded(CAPACITY) as balancer, libbpf.run_stats_enabled():
        load_s = time.monotonic() - started
        wires = Wires()
        fill(balancer, wires.add(balancer.fd))
        costs: dict[str, list[float]] = {name: [] for name in ("nothing", "floor", *(c.name for c in CASES))}
        for _ in range(rounds):
            costs["nothing"].append(wires.cost(wires.nothing, CASES[0]))
            costs["floor"].append(wires.cost(wires.floor, CASES[0]))
            for case in CASES:
                costs[case.name].append(wires.cost(balancer.fd, case))
        usual = {name: statistics.median(seen) for name, seen in costs.items()}
        floor = usual["floor"] - usual["nothing"]
        yield row("floor", floor, "ns", None)
        for case in CASES:
            net_ns = usual[case.name] - usual["nothing"]
            yield row(case.name, net_ns / floor, "x floor", case.goal) | {"net_ns": round(net_ns, 1)}
        info = balancer.pinned.info()
        yield row("instructions", info.instructions, "instructions", None)
        yield row("instructions walked by the verifier", info.verified, "instructions", None)
        yield row("compile and load", load_s, "s", None)


def row(case: str, value: float, unit: str, goal: float | None) -> dict[str, object]:
    met = None if goal is None else value <= goal
    return {
        "bench": "packet cost",
        "case": case,
        "value": round(value, 2),
        "unit": unit,
        "goal": goal,
        "met": met,
    }


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for results
    for line in measure(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        print(json.dumps(line), flush=True)
