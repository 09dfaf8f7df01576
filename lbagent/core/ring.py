"""The table of a ring: which backend each slot belongs to. Weighted Maglev on a power of two.

Every backend visits all slots in an order of its own and, turn by turn, takes the next one that is free.
Turns come in proportion to weight, so few slots move when a backend or a weight changes (Eisenbud et al.,
Maglev, NSDI 2016, section 3.4). An odd step visits every slot of a power of two, which is all that the
paper's prime is for.

A table depends on the set of (address, port, weight) and the seed alone: all nodes build the same one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Address
from itertools import repeat
from typing import NamedTuple

from lbagent.core import _ring
from lbagent.core.model import RING_BITS
from lbagent.errors import InconsistentSnapshot

SLOTS_EACH = 100  # that a ring has for each registered instance, while there is a size for that
MEMBERS_MAX = 1 << 16  # of one ring; the compiled code counts them in 16 bits
BIG_BITS = 16  # tables from 256 KiB

_Numbers = tuple[int, ...]


class Member(NamedTuple):
    address: IPv4Address
    port: int
    weight: int


def ring_bits(backends: int) -> int:
    """The smallest ring (2^bits slots) for so many registered instances, whatever their health."""
    return next((bits for bits in RING_BITS if 1 << bits >= SLOTS_EACH * backends), RING_BITS[-1])


def build(members: Sequence[Member], bits: int, seed: int) -> bytes:
    """Spread `members` over 2^bits slots.

    Returns uint32 for each slot: i stands for members[i - 1], 0 for nobody, if nobody has weight. Shares
    are within one slot of exact; one of less than a slot may be none. Members of weight 0 take no slot.
    Raises InconsistentSnapshot when members with weight outnumber slots, or MEMBERS_MAX.
    """
    return _build(*_named(members), bits, seed)


def digest(members: Sequence[Member], bits: int, seed: int) -> str:
    """16 hex digits, equal on two nodes whose rings send every slot to the same address."""
    weighed = sorted((name, weight) for name, weight in zip(*_named(members), strict=True) if weight)
    return _digest(tuple(name for name, _ in weighed), tuple(weight for _, weight in weighed), bits, seed)


def _named(members: Sequence[Member]) -> tuple[_Numbers, _Numbers]:
    """(address and port as one number, weight) of all members: numbers hash far faster than addresses."""
    names = tuple([int(address) << 16 | port for address, port, _ in members])
    return names, tuple([weight for _, _, weight in members])


def _build(names: _Numbers, weights: _Numbers, bits: int, seed: int) -> bytes:
    most = min(1 << bits, MEMBERS_MAX)
    if (taking := len(names) - weights.count(0)) > most:
        raise InconsistentSnapshot(f"{taking} backends do not fit into a ring, which takes {most}")
    return (_small if bits < BIG_BITS else _big)(names, weights, bits, seed)


def _table(names: _Numbers, weights: _Numbers, bits: int, seed: int) -> bytes:
    keys = array("Q", map(_key, names, repeat(seed)))
    return _ring.build(keys, array("Q", names), array("I", weights), bits)


# 8 MiB each at most: plans ask again and again for rings that did not change.
_small = lru_cache(128)(_table)
_big = lru_cache(8)(_table)


@lru_cache(256)
def _digest(names: _Numbers, weights: _Numbers, bits: int, seed: int) -> str:
    said = blake2b(repr((names, weights, bits, seed)).encode(), digest_size=8)
    said.update(_build(names, weights, bits, seed))
    return said.hexdigest()


@lru_cache(1 << 14)
def _key(name: int, seed: int) -> int:
    """64 bits that decide a member's rank among its peers, its first slot and its step."""
    hashed = blake2b(name.to_bytes(6, "little"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(hashed.digest(), "little")
