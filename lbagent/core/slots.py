"""The bookkeeping of slots: owner, elder, and how long a change of owner is tracked.

A slot is 64 bits, as bpf/abi.h says; a ring's slots come as bytes, 8 for each. In a slot that is not
tracked all packets go to the owner, elder is the owner too and `changed` is 0, so that equal slots are equal
words. The first change of owner makes the old owner the elder and the slot tracked: from then on every
connection is recorded, and one without a record is older than the change, so it is the elder's. Tracking
ends when the slot has not changed for the settle time, in which every connection that lives was recorded,
and no record disagrees with the owner.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lbagent.core import _ring


def renumber(table: bytes, numbers: Sequence[int]) -> bytes:
    """Owners for a ring's table (core/ring.py): `numbers` are the members' real numbers, in their order."""
    return _ring.renumber(table, array("I", numbers))


def fresh(owners: bytes) -> bytes:
    """Slots of a new ring, none of them tracked. owners: uint32 real number for each."""
    return _ring.fresh(owners)


def succeed(slots: bytes, owners: bytes, dead: Collection[int], now_s: int) -> bytes:
    """The slots once `owners` take over.

    A slot keeps its elder while it is tracked. One that was not becomes tracked, unless its owner was nobody
    or is dead: then no connection of it is left that could be told apart. A slot may become nobody's; its
    elder still serves the connections it has.
    """
    return _ring.succeed(slots, owners, dead, now_s)


def resize(slots: bytes, bits: int, new_bits: int) -> bytes | None:
    """The same choices in 2^new_bits slots; None when the slots that would have to be one differ.

    Sizes nest: a connection's slot is the top bits of its hash, so slot s of a ring is slots 4s .. 4s + 3 of
    one four times as big.
    """
    _expect(slots, 8 << bits)
    if new_bits >= bits:
        return _ring.repeat(slots, 8, new_bits - bits)
    return _ring.thin(slots, bits - new_bits)


def stretch(owners: bytes, bits: int, new_bits: int) -> bytes:
    """Owners of a small ring for the slots of a bigger one that chooses just like it."""
    _expect(owners, 4 << bits)
    return _ring.repeat(owners, 4, new_bits - bits)


def heads(slots: bytes) -> bytes:
    """What nearly all packets need of each slot, uint32: its owner, and as top bit whether it is tracked."""
    return _ring.heads(slots)


def settled(slots: bytes, exceptions: Collection[int], settle_s: int, now_s: int) -> list[int]:
    """Slots whose tracking may end: last changed more than settle_s ago, and not among the exceptions."""
    return _ring.settled(slots, exceptions, settle_s, now_s)


def settle(slots: bytes, numbers: Iterable[int]) -> bytes:
    """The slots with the tracking of these ended."""
    return _ring.settle(slots, numbers)


def census(slots: bytes) -> tuple[dict[int, int], dict[int, int]]:
    """(slots by owner, tracked slots by elder).

    Nobody's slots are counted too, as owned by 0. An elder counts even where it has become the owner again:
    that slot has not settled. A real that neither names gets packets by its records alone.
    """
    return _ring.census(slots)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What flow records say.

    forget: indices of records that no packet needs any more. live: the others, counted by real number.
    exceptions: by VIP number, slots that cannot settle, as a live record disagrees with their owner.
    """

    forget: list[int]
    live: dict[int, int]
    exceptions: dict[int, list[int]]


def judge(
    keys: bytes,
    values: bytes,
    count: int,
    vips: Mapping[int, tuple[int, bytes, int]],
    reals: Mapping[int, tuple[int, int, bool]],
    now_ns: int,
    ending_s: int = 10,
    udp_idle_s: int = 30,
) -> Judgement:
    """Judge `count` raw `struct flow_key`s and `struct flow`s.

    vips: number -> (bits, slots, settle_s). reals: number -> (VIP number, generation, whether it serves).
    A record is forgotten when its VIP or real is gone, when it was silent for too long (settle_s, for UDP
    udp_idle_s; ending_s if shorter and its end was seen), and for TCP when its slot is not tracked. UDP is
    never an exception: its records decide whether or not a slot is tracked.
    """
    return Judgement(*_ring.judge(keys, values, count, dict(vips), dict(reals), now_ns, ending_s, udp_idle_s))


def _expect(words: bytes, size: int) -> None:
    if len(words) != size:
        raise ValueError(f"{len(words)} bytes are not a ring of {size}")
