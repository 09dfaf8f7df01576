"""1,000 swaps under live traffic: no packet is dropped, and none goes to a backend of neither ring.

    python -m tests.bench.swaps

New connections are sent by the kernel itself as fast as it can. After each swap the counters say which
backends got some since the swap before: a packet chosen by an older ring would show.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from lbagent.core.model import Backend, Capacity, Duty, Hop, Live, Proto, Snapshot, SwapRings, Vip, VipKey
from lbagent.core.plan import plan
from lbagent.core.steps import advance
from lbagent.dataplane import libbpf
from lbagent.dataplane.kernel import Kernel
from tests.bench.cost import Case, Wires
from tests.loaded import VIP, loaded, real_address

SWAPS = 1000
BACKENDS = 12
ACTIVE = 4  # at a time; the next swap keeps one of them
CAPACITY = Capacity(vips=16, reals=64, flows=1 << 16)
CHUNK = 200_000  # frames by one call
SYNS = Case("syn", "syn", 90_000, None)


@dataclass
class Traffic:
    """Frames from the kernel's own source, without a pause until `stop`."""

    wires: Wires
    began: float = field(default_factory=time.monotonic)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self, program: int) -> None:
        self.wires.aim(program, SYNS)
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        while not self._stop.is_set():
            self.wires.send(SYNS, CHUNK)

    def stop(self) -> float:
        """Seconds since the beginning."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        return time.monotonic() - self.began


def want(active: set[int], ifindex: int) -> Snapshot:
    backends = tuple(
        Backend(
            real_address(n),
            80,
            1,
            Duty.ACTIVE if n in active else Duty.DRAINING,
            Hop(b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2", ifindex, 1500),
        )
        for n in range(1, BACKENDS + 1)
    )
    return Snapshot((Vip("web", (VipKey(VIP, 80, Proto.TCP),), backends, 12),))


def active_in(turn: int) -> set[int]:
    return {1 + (turn * (ACTIVE - 1) + n) % BACKENDS for n in range(ACTIVE)}


def host_of(live: Live, number: int) -> int:
    return int(live.reals[number].address) - int(real_address(0))


@dataclass
class Played:
    """took_ms: each apply of a new ring, the kernel's grace period included. rate: packets a second."""

    took_ms: list[float] = field(default_factory=list)
    rate: float = 0.0


def play() -> Played:
    """Raises AssertionError as soon as a packet is lost or goes astray."""
    played = Played()
    with (
        loaded(CAPACITY) as balancer,
        Kernel(balancer.pinned.directory) as kernel,
        libbpf.run_stats_enabled(),
    ):
        wires = Wires()
        ifindex = wires.add(balancer.fd)
        live = kernel.read()
        before: dict[int, int] = {}
        allowed: set[int] = set()
        traffic = Traffic(wires)
        try:
            for turn in range(SWAPS + 1):
                active = active_in(turn)
                for step in plan(live, want(active, ifindex), 1, turn):
                    began = time.perf_counter()
                    kernel.apply(step)
                    live = advance(live, step)
                    if isinstance(step, SwapRings) and turn:
                        played.took_ms.append((time.perf_counter() - began) * 1e3)
                if turn == 0:
                    traffic.start(balancer.fd)
                    allowed = active
                    continue
                reals = kernel.counters().reals
                counts = {host_of(live, number): packets for number, (packets, _) in reals.items()}
                grown = {n for n, packets in counts.items() if packets > before.get(n, 0)}
                assert grown <= allowed | active, f"swap {turn}: packets to {grown - allowed - active}"
                before, allowed = counts, active
        finally:
            took_s = traffic.stop()
        runs = wires.settled_runs(balancer.fd)
        counters = kernel.counters()
        assert not any(counters.drops.values()), counters.drops
        assert counters.vips[0][0] == runs > 0, "every packet that came went on"
        assert sum(packets for packets, _ in counters.reals.values()) == runs
        played.rate = runs / took_s
        assert len(played.took_ms) == SWAPS
        return played


def measure() -> Iterator[dict[str, object]]:
    with ThreadPoolExecutor(1) as aside:  # its thread leaves this network namespace for good
        played = aside.submit(play).result()
    took = sorted(played.took_ms)
    yield row("packets a second meanwhile", played.rate, "packets/s", 200_000, met=played.rate >= 200_000)
    for name, at in (("p50", 0.5), ("p99", 0.99)):
        yield row(f"one swap, {name} of {len(took)}", took[int(at * len(took))], "ms", None, met=None)


def row(case: str, value: float, unit: str, goal: float | None, met: bool | None) -> dict[str, object]:
    return {
        "bench": "swaps under load",
        "case": case,
        "value": round(value, 2),
        "unit": unit,
        "goal": goal,
        "met": met,
    }


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for results
    for line in measure():
        print(json.dumps(line), flush=True)
