"""Random histories: no connection to a live backend ever changes backend, and quiet times record nothing.

Connections, packets and the clock are played; rings, slots and the sweep are those of lbagent.core. A
packet goes where `reference.choose` says.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core import ring, slots
from tests.reference import ENDING, Record, Slot, choose, unpack

BITS = 8  # few slots, so that every history has many connections in each
SETTLE_S = 50
MAX_IDLE_S = 40
ENDING_S = 10
VIP = 3
TCP = 6


@dataclass
class Balancer:
    """A VIP's slots and records, and the backends behind its real numbers."""

    now_s: int
    content: bytes = b""
    now_slots: list[Slot] = field(default_factory=list)
    records: dict[int, Record] = field(default_factory=dict)  # by connection
    numbers: dict[str, int] = field(default_factory=dict)  # of backends
    generations: dict[int, int] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    peak: int = 0

    def install(self, active: set[str], dead: set[str], seed: int) -> None:
        self.dead = dead
        for name in sorted(active - self.numbers.keys()):
            number = next(n for n in range(1, 999) if n not in self.numbers.values())
            self.generations[number] = self.generations.get(number, -1) + 1
            self.numbers[name] = number
        named = sorted(active)
        members = [ring.Member(IPv4Address(int(name)), 80, 1 + int(name) % 3) for name in named]
        owners = slots.renumber(ring.build(members, BITS, seed), [self.numbers[name] for name in named])
        gone = {self.numbers[name] for name in dead}
        content = (
            slots.succeed(self.content, owners, gone, self.now_s) if self.content else slots.fresh(owners)
        )
        self.write(content)
        assert array("I", owners).tolist() == [slot.owner for slot in self.now_slots]

    def write(self, content: bytes) -> None:
        self.content, self.now_slots = content, unpack(content)

    def forward(self, connection: int, opens: bool = False, ends: bool = False) -> str | None:
        hashed = hash_of(connection)
        serving = {n for name, n in self.numbers.items() if name not in self.dead}
        record = self.records.get(connection)
        known = record is not None and self.generations[record.real] == record.generation
        held = record.real if known and record else None
        number, is_recorded = choose(self.now_slots[hashed >> 32 - BITS], held, opens, serving)
        if is_recorded:
            flags = ENDING if ends else 0
            self.records[connection] = Record(
                self.now_s * 10**9, number, hashed, VIP, self.generations[number], flags, TCP
            )
        self.peak = max(self.peak, len(self.records))
        return next((name for name, n in self.numbers.items() if n == number), None)

    def sweep(self) -> dict[int, int]:
        """Live records by real number."""
        connections = list(self.records)
        verdict = slots.judge(
            b"".join(self.records[c].key(c) for c in connections),
            b"".join(self.records[c].value for c in connections),
            len(connections),
            {VIP: (BITS, self.content, SETTLE_S)},
            {n: (VIP, self.generations[n], name not in self.dead) for name, n in self.numbers.items()},
            self.now_s * 10**9,
            ENDING_S,
        )
        for index in verdict.forget:
            del self.records[connections[index]]
        exceptions = verdict.exceptions.get(VIP, [])
        self.write(slots.settle(self.content, slots.settled(self.content, exceptions, SETTLE_S, self.now_s)))
        return verdict.live

    def clear(self, kept: set[str], live: dict[int, int]) -> None:
        """Free the numbers that no slot and no record names; the next new backends get them."""
        owners, elders = slots.census(self.content)
        named = owners.keys() | elders.keys() | live.keys()
        self.numbers = {name: n for name, n in self.numbers.items() if name in kept or n in named}


def hash_of(connection: int) -> int:
    return connection * 0x9E3779B1 % 2**32


@dataclass
class History:
    rng: random.Random
    balancer: Balancer
    active: set[str]
    draining: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    began_on: dict[int, tuple[str | None, int]] = field(default_factory=dict)  # and when last seen
    connections: int = 0
    backends: int = 100

    def change(self) -> None:
        rng = self.rng
        match rng.choice(["add", "drain", "drain", "undrain", "die", "recover", "remove"]):
            case "add":
                self.backends += 1
                self.active.add(str(self.backends))
            case "drain" if self.active:
                self.move(self.active, self.draining)
            case "undrain" if self.draining:
                self.move(self.draining, self.active)
            case "die" if self.active | self.draining:
                self.move(self.active or self.draining, self.dead)
            case "recover" if self.dead:
                self.move(self.dead, self.active)
            case "remove":
                used = {name for name, _ in self.began_on.values()}
                self.draining -= {name for name in self.draining if name not in used}
                self.dead -= set(rng.sample(sorted(self.dead), len(self.dead) // 2))
        self.balancer.install(self.active, self.known_dead(), seed=9)
        lost = [c for c, (name, _) in self.began_on.items() if name in self.dead]
        for connection in lost:  # with their backend, by definition
            del self.began_on[connection]

    def known_dead(self) -> set[str]:
        """Also those that were forgotten altogether; their numbers may wait to be cleared."""
        return {name for name in self.balancer.numbers if name not in self.active | self.draining}

    def move(self, source: set[str], target: set[str]) -> None:
        name = self.rng.choice(sorted(source))
        source.discard(name)
        target.add(name)

    def play(self) -> None:
        rng, balancer = self.rng, self.balancer
        if rng.random() < 0.05:
            self.change()
        for _ in range(rng.randint(0, 6)):
            name = balancer.forward(self.connections, opens=True)
            if name is not None:
                self.began_on[self.connections] = (name, balancer.now_s)
            self.connections += 1
        for connection, (name, seen_s) in list(self.began_on.items()):
            if balancer.now_s - seen_s >= MAX_IDLE_S - 1 or rng.random() < 0.2:
                got = balancer.forward(connection)
                assert got == name, f"t={balancer.now_s}: {connection} began on {name}, went to {got}"
                self.began_on[connection] = (name, balancer.now_s)
            elif rng.random() < 0.04:
                assert balancer.forward(connection, ends=True) == name
                del self.began_on[connection]
        if balancer.now_s % 5 == 0:
            live = balancer.sweep()
            balancer.clear(self.active | self.draining | self.dead, live)


def begin(seed: int) -> History:
    rng = random.Random(seed)
    # Seconds wrap around in the middle of some histories.
    history = History(
        rng, Balancer(now_s=2**23 - rng.randint(0, 600)), {str(n) for n in range(1, rng.randint(2, 9))}
    )
    history.balancer.install(history.active, set(), seed=9)
    return history


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32))
def test_no_connection_to_a_live_backend_changes_backend(seed: int) -> None:
    history = begin(seed)
    for _ in range(400):
        history.play()
        history.balancer.now_s += 1


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32))
def test_once_all_is_quiet_nothing_is_tracked_or_recorded(seed: int) -> None:
    history = begin(seed)
    for _ in range(100):
        history.play()
        history.balancer.now_s += 1
    balancer = history.balancer
    for _ in range(SETTLE_S // 5 * 2 + 2):
        balancer.now_s += 5
        balancer.sweep()
    assert not any(slot.tracked for slot in balancer.now_slots)
    balancer.sweep()
    assert not balancer.records
    for connection in range(500):
        balancer.forward(connection, opens=True)
    assert not balancer.records


def test_histories_have_something_to_record() -> None:
    """Or the others would show nothing: changes, records, and real numbers that are used again."""
    histories = [begin(seed) for seed in range(6)]
    for history in histories:
        for _ in range(400):
            history.play()
            history.balancer.now_s += 1
    assert all(history.connections > 1000 for history in histories)
    assert sum(history.balancer.peak > 50 for history in histories) > 3
    assert any(max(history.balancer.generations.values()) > 0 for history in histories)
