"""What core/ring.py and core/slots.py mean, in plain Python: slow, short, and written from the rules alone.

`build` is Maglev by plain probing, `choose` is what the XDP program does with one packet; the others are the
loops of core/_ring.c one slot or record at a time. Tests hold the compiled code and the program to these.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

from lbagent.core.ring import Member

REAL = (1 << 20) - 1
CHANGED = (1 << 23) - 1
UDP = 17
ENDING = 1  # FLOW_ENDING of abi.h


# ---- a ring's table -----------------------------------------------------------------------------


def key(member: Member, seed: int) -> int:
    name = member.address.packed[::-1]
    hashed = blake2b(
        member.port.to_bytes(2, "little") + name, digest_size=8, key=seed.to_bytes(8, "little")
    ).digest()
    return int.from_bytes(hashed, "little")


def quotas(weights: Sequence[int], slots: int) -> list[int]:
    """Largest remainders. weights: by rank. Ties go to the heavier, then to the lower rank."""
    total = sum(weights)
    shares = [slots * weight // total for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(slots * weights[i] % total), -weights[i], i))
    for i in order[: slots - sum(shares)]:
        shares[i] += 1
    return shares


def turns(weights: Sequence[int], slots: int) -> list[int]:
    """Whose turn it is, by rank. The heaviest has one each round, the others in proportion, evenly spaced.

    Who still has turns after the last round has them then, one after the other.
    """
    last = slots * max(weights) // sum(weights) + 1
    events: list[tuple[int, int, int]] = []
    for rank, (weight, quota) in enumerate(zip(weights, quotas(weights, slots), strict=True)):
        spacing = (max(weights) << 32) // weight
        late = count()
        for turn in range(quota):
            round_ = spacing // 2 + turn * spacing >> 32
            events.append((round_, 0, rank) if round_ < last else (last, next(late), rank))
    return [rank for _, _, rank in sorted(events)]


def build(
    members: Sequence[Member], bits: int, seed: int, key: Callable[[Member, int], int] = key
) -> list[int]:
    """A member's index + 1 for each of 2^bits slots."""
    slots = 1 << bits
    taking = sorted(
        (key(m, seed), m.address, m.port, m.weight, i) for i, m in enumerate(members, 1) if m.weight
    )
    if not taking:
        return [0] * slots
    at = [hashed % slots for hashed, *_ in taking]
    table = [0] * slots
    for rank in turns([weight for *_, weight, _ in taking], slots):
        step = (taking[rank][0] >> 32 | 1) % slots
        while table[at[rank]]:
            at[rank] = (at[rank] + step) % slots
        table[at[rank]] = taking[rank][-1]
    return table


# ---- slots --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    owner: int
    elder: int
    changed: int
    tracked: bool

    @property
    def word(self) -> int:
        return self.owner | self.elder << 20 | self.changed << 40 | self.tracked << 63


def quiet(owner: int) -> Slot:
    return Slot(owner, owner, 0, False)


def unpack(slots: bytes) -> list[Slot]:
    return [
        Slot(word & REAL, word >> 20 & REAL, word >> 40 & CHANGED, bool(word >> 63))
        for (word,) in struct.iter_unpack("<Q", slots)
    ]


def pack(slots: Iterable[Slot]) -> bytes:
    return b"".join(struct.pack("<Q", slot.word) for slot in slots)


def succeed(slots: bytes, owners: Sequence[int], dead: Collection[int], now_s: int) -> bytes:
    def after(slot: Slot, owner: int) -> Slot:
        if owner == slot.owner:
            return slot
        if slot.tracked:
            return Slot(owner, slot.elder, now_s & CHANGED, True)
        if slot.owner and slot.owner not in dead:
            return Slot(owner, slot.owner, now_s & CHANGED, True)
        return quiet(owner)

    return pack(after(slot, owner) for slot, owner in zip(unpack(slots), owners, strict=True))


def resize(slots: bytes, bits: int, new_bits: int) -> bytes | None:
    words = [slots[i : i + 8] for i in range(0, len(slots), 8)]
    if new_bits >= bits:
        return b"".join(word for word in words for _ in range(1 << new_bits - bits))
    size = 1 << bits - new_bits
    families = [words[i : i + size] for i in range(0, len(words), size)]
    return b"".join(family[0] for family in families) if all(len(set(f)) == 1 for f in families) else None


def settled(slots: bytes, exceptions: Collection[int], settle_s: int, now_s: int) -> list[int]:
    return [
        number
        for number, slot in enumerate(unpack(slots))
        if slot.tracked and (now_s - slot.changed) % (CHANGED + 1) > settle_s and number not in exceptions
    ]


def settle(slots: bytes, numbers: Collection[int]) -> bytes:
    return pack(quiet(s.owner) if n in numbers else s for n, s in enumerate(unpack(slots)))


def census(slots: bytes) -> tuple[dict[int, int], dict[int, int]]:
    words = unpack(slots)
    return dict(Counter(s.owner for s in words)), dict(Counter(s.elder for s in words if s.tracked))


# ---- flow records -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """`struct flow`, and the protocol of its key."""

    seen_ns: int
    real: int
    hash: int
    vip: int
    generation: int
    flags: int
    proto: int

    @property
    def value(self) -> bytes:
        return struct.pack(
            "<QIIIHBx", self.seen_ns, self.real, self.hash, self.vip, self.generation, self.flags
        )

    def key(self, number: int) -> bytes:
        return struct.pack("<36sB3x", number.to_bytes(36, "big"), self.proto)


Judged = tuple[list[int], dict[int, int], dict[int, list[int]]]


def judge(
    records: Sequence[Record],
    vips: Mapping[int, tuple[int, bytes, int]],
    reals: Mapping[int, tuple[int, int, bool]],
    now_ns: int,
    ending_s: int,
    udp_idle_s: int,
) -> Judged:
    """(indices to forget, live records by real, exceptions by VIP)"""
    forget: list[int] = []
    live: Counter[int] = Counter()
    exceptions: dict[int, set[int]] = {}
    for index, record in enumerate(records):
        slot_number = _slot_that_keeps(record, vips, reals, now_ns, ending_s, udp_idle_s)
        if slot_number is None:
            forget.append(index)
            continue
        live[record.real] += 1
        if record.proto != UDP and unpack(vips[record.vip][1])[slot_number].owner != record.real:
            exceptions.setdefault(record.vip, set()).add(slot_number)
    return forget, dict(live), {vip: sorted(found) for vip, found in exceptions.items()}


def _slot_that_keeps(
    record: Record,
    vips: Mapping[int, tuple[int, bytes, int]],
    reals: Mapping[int, tuple[int, int, bool]],
    now_ns: int,
    ending_s: int,
    udp_idle_s: int,
) -> int | None:
    if record.vip not in vips or reals.get(record.real) != (record.vip, record.generation, True):
        return None
    bits, slots, settle_s = vips[record.vip]
    limit_s = udp_idle_s if record.proto == UDP else settle_s
    if record.flags & ENDING:
        limit_s = min(limit_s, ending_s)
    number = record.hash >> 32 - bits
    if now_ns - record.seen_ns > limit_s * 10**9:
        return None
    return number if record.proto == UDP or unpack(slots)[number].tracked else None


# ---- a packet -----------------------------------------------------------------------------------


def choose(slot: Slot, record: int | None, opens: bool, serving: Collection[int]) -> tuple[int, bool]:
    """Where a TCP packet goes: (real, 0 for nobody; whether that is in the connection's record from now on).

    record: the real that the connection's record names, if it has one. opens: a SYN without ACK.
    serving: reals that take packets; the owner does, whatever it is.
    """
    if not slot.tracked:
        return slot.owner, False
    if record is not None and record in serving and not opens:
        return record, True
    if record is None and not opens and slot.elder in serving:
        return slot.elder, True
    return slot.owner, slot.owner != 0
