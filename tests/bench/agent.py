"""The agent as an operator feels it: from a changed check to the swapped ring, start to adopted, memory.

    python -m tests.bench.agent [changes]

A real Consul and the real process, in namespaces of their own, with one service of 100 backends. A change is
a check's new state in Consul's catalogue, counted from Consul's word that it is written; it is live when the
kernel's outer map names another ring, which is looked for in the kernel, not asked of the agent.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lbagent.core.ring import ring_bits
from lbagent.dataplane import abi, libbpf
from tests.world.lab import WEB_PORT, Lab, lab
from tests.world.net import ip
from tests.world.procs import until

BACKENDS = 100
CHANGES = 100
STARTS = 5
VIP = "203.0.113.10"
POLL_S = 0.0005
# systemd starts units with a clean environment. A shell's bundle of certificates, if it names one, would be
# parsed when aiohttp is imported.
AS_A_UNIT = {"SSL_CERT_FILE": "", "SSL_CERT_DIR": ""}


def measure(changes: int) -> Iterator[dict[str, object]]:
    with lab(backends={}) as here:
        for n in range(1, BACKENDS + 1):
            ip(f"-n {here.edge.host.namespace} neigh add {address(n)} lladdr 02:00:00:00:01:{n:02x} dev eth0")
            put(here, n, "passing")
        until(lambda: len(spread(here)) == BACKENDS, "all backends to get new connections")
        took = statistics.median(started(here) for _ in range(STARTS))
        yield row("agent start", f"start to adopted, median of {STARTS}", took, "s", 1.0)
        yield row("agent memory", f"resident, {BACKENDS} backends", resident_mb(here), "MB", 120)
        times = sorted(changed(here, turn) for turn in range(changes))
        for name, at in (("p50", 0.5), ("p99", 0.99)):
            value = times[min(len(times) - 1, int(at * len(times)))] * 1e3
            yield row("check to ring", f"{name} of {changes}, {BACKENDS} backends", value, "ms", 60)
        yield row("agent memory", f"resident, after {changes} changes", resident_mb(here), "MB", 120)


def address(n: int) -> str:
    return f"10.77.0.{100 + n}"


def put(here: Lab, n: int, status: str) -> None:
    here.server.put(
        "catalog/register",
        {
            "Node": f"n{n}",
            "Address": address(n),
            "Service": {
                "Service": "web",
                "ID": f"web-{n}",
                "Port": WEB_PORT,
                "Tags": ["lb"],
                "Meta": {"lb-vip": VIP, "lb-settle": "1s"},
            },
            "Check": {"CheckID": f"web-{n}", "Name": "web", "ServiceID": f"web-{n}", "Status": status},
        },
    )


def spread(here: Lab) -> set[str]:
    status = here.edge.service("web")
    return {b["node"] for b in status["backends"] if b["slots"]} if status else set()


def changed(here: Lab, turn: int) -> float:
    """Seconds from Consul's word that it took the change to the new ring in the kernel."""
    place = (ring_bits(BACKENDS) - abi.RING_BITS_MIN) // abi.RING_BITS_STEP
    (pins,) = (path for path in here.net.pins(here.edge.host).iterdir() if path.is_dir())
    with libbpf.opened(pins / "rings") as rings:
        before = libbpf.map_lookup(rings, place.to_bytes(4, sys.byteorder), 4)
        put(here, 1 + turn % BACKENDS, "critical" if turn // BACKENDS % 2 == 0 else "passing")
        began = time.monotonic()
        until_moved(rings, place, before)
        return time.monotonic() - began


def until_moved(rings: int, place: int, before: bytes | None) -> None:
    end = time.monotonic() + 10
    while libbpf.map_lookup(rings, place.to_bytes(4, sys.byteorder), 4) == before:
        if time.monotonic() > end:
            raise TimeoutError("the ring was not swapped within 10 s")
        time.sleep(POLL_S)


def started(here: Lab) -> float:
    """Seconds from a new process to the word that it has taken over what is live, after a SIGKILL."""
    here.edge.kill()
    path = here.procs.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        began = time.monotonic()
        here.edge.start(env={"NOTIFY_SOCKET": str(path), **AS_A_UNIT}, wait=False)
        while b"READY=1" not in manager.recv(4096):
            pass
        took = time.monotonic() - began
    path.unlink()
    until(here.edge.is_ready, "the agent to be ready")
    return took


def resident_mb(here: Lab) -> float:
    assert here.edge.agent is not None
    status = Path(f"/proc/{here.edge.agent.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def row(bench: str, case: str, value: float, unit: str, goal: float) -> dict[str, object]:
    return {
        "bench": bench,
        "case": case,
        "value": round(value, 3),
        "unit": unit,
        "goal": goal,
        "met": value <= goal,
    }


if __name__ == "__main__":
    for line in measure(int(sys.argv[1]) if len(sys.argv) > 1 else CHANGES):
        print(json.dumps(line), flush=True)
