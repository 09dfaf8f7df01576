"""What rings and the sweep cost in the agent: `python -m tests.bench.ring`, one JSON object a line.

A ring is measured as the agent meets it: one backend went, so the others' keys are known, the table is not.
The median of some rounds is told.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

from lbagent.core import ring, slots
from lbagent.core.ring import Member
from tests.reference import Record

ROUNDS = 50
SEED = 7
GOALS_MS = {10: None, 100: None, 1000: 3.0, 4000: None}
RECORDS = 500_000
JUDGE_MS = 50.0


def median_ms(call: Callable[[int], object], rounds: int) -> float:
    found = []
    for turn in range(rounds):
        started = time.perf_counter()
        call(turn)
        found.append(time.perf_counter() - started)
    return statistics.median(found) * 1e3


def row(bench: str, case: str, value: float, goal: float | None) -> dict[str, object]:
    met = None if goal is None else value <= goal
    return {"bench": bench, "case": case, "value": round(value, 3), "unit": "ms", "goal": goal, "met": met}


def build_ms(backends: int, rounds: int) -> float:
    members = tuple(Member(IPv4Address("10.0.0.0") + n, 80, 1) for n in range(backends))
    bits = ring.ring_bits(backends)
    ring.build(members, bits, SEED)
    left = [members[:gone] + members[gone + 1 :] for gone in range(min(rounds, backends))]
    return median_ms(lambda turn: ring.build(left[turn], bits, SEED), len(left))


def sweep_ms(rounds: int) -> Iterator[tuple[str, float]]:
    """On a ring of 2^18 slots with all of its slots tracked; one in ten records disagrees with the owner."""
    rng = random.Random(SEED)
    bits, reals = 18, 1000
    owners = array("I", (1 + n % reals for n in range(1 << bits)))
    before = slots.fresh(array("I", owners[1:] + owners[:1]).tobytes())
    content = slots.succeed(before, owners.tobytes(), set(), 1000)
    now_ns = 1030 * 10**9
    records = []
    for _ in range(RECORDS):
        hashed = rng.getrandbits(32)
        real = rng.randint(1, reals) if rng.random() < 0.1 else owners[hashed >> 32 - bits]
        records.append(Record(now_ns - rng.randrange(10**10), real, hashed, 0, 0, 0, 6))
    keys = b"".join(record.key(n) for n, record in enumerate(records))
    values = b"".join(record.value for record in records)
    table = owners.tobytes()
    known = dict.fromkeys(range(1, reals + 1), (0, 0, True))
    vips = {0: (bits, content, 300)}
    yield (
        "judge, 500,000 records",
        median_ms(lambda _: slots.judge(keys, values, RECORDS, vips, known, now_ns), rounds),
    )
    yield "settled, 2^18 slots", median_ms(lambda _: slots.settled(content, (), 10, 1030), rounds)
    yield "census, 2^18 slots", median_ms(lambda _: slots.census(content), rounds)
    yield "succeed, 2^18 slots", median_ms(lambda _: slots.succeed(before, table, set(), 1), rounds)


def measure(rounds: int) -> Iterator[dict[str, object]]:
    for backends, goal in GOALS_MS.items():
        yield row("ring_build", str(backends), build_ms(backends, rounds), goal)
    for case, value in sweep_ms(max(rounds // 5, 1)):
        yield row("slots", case, value, JUDGE_MS if case.startswith("judge") else None)


if __name__ == "__main__":
    for line in measure(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        print(json.dumps(line), flush=True)
