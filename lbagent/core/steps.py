"""What each step does to what is live, and what must hold in between.

`advance` is the meaning of a step without a kernel: the planner's tests, the fake data plane and the
reconciler's own picture all use this one function. `judge` is the promise of the project: whatever a
packet can reach is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar, assert_never

from lbagent.core import slots
from lbagent.core.model import (
    NOBODY,
    Announce,
    ClearReals,
    DropRings,
    ForgetFlows,
    Live,
    RealState,
    RingId,
    SettleSlots,
    Step,
    SwapRings,
    Withdraw,
    WriteReals,
)
from lbagent.errors import InconsistentSnapshot

K = TypeVar("K")
V = TypeVar("V")


def advance(live: Live, step: Step) -> Live:
    """What is live once `step` is done."""
    match step:
        case WriteReals(reals):
            return replace(live, reals={**live.reals, **reals})
        case SwapRings(rings):
            return replace(live, rings={**live.rings, **rings}, records=None)
        case Announce(vips):
            return replace(live, vips={**live.vips, **vips})
        case Withdraw(keys):
            return replace(live, vips=_without(live.vips, keys))
        case DropRings(rings_):
            return replace(live, rings=_without(live.rings, rings_))
        case ClearReals(numbers):
            freed = {n: replace(live.reals[n], state=RealState.FREE, hop=None) for n in numbers}
            return replace(live, reals={**live.reals, **freed})
        case SettleSlots(ring, numbers):
            return replace(live, rings={**live.rings, ring: slots.settle(live.rings[ring], numbers)})
        case ForgetFlows():
            return live
        case _:
            assert_never(step)


def judge(live: Live) -> None:
    """Raise InconsistentSnapshot when a packet could meet something incomplete."""
    for key, vip in live.vips.items():
        ring = RingId(vip.number, vip.ring_bits)
        if ring not in live.rings:
            raise InconsistentSnapshot(f"{key} names ring {ring}, which is not there")
        judge_ring(live, ring, live.rings[ring])
    for number in live.records or ():
        if live.reals[number].state is RealState.FREE:
            raise InconsistentSnapshot(f"real {number} is free, but flow records name it")


def judge_ring(live: Live, ring: RingId, content: bytes) -> None:
    """Raise unless every real that `content` names can serve for this ring's VIP."""
    if len(content) != 8 << ring.bits:
        raise InconsistentSnapshot(f"ring {ring} has {len(content)} bytes, not {8 << ring.bits}")
    owners, elders = slots.census(content)
    for number in (owners.keys() | elders.keys()) - {NOBODY}:
        real = live.reals.get(number)
        if real is None or real.state is RealState.FREE or real.vip != ring.vip or real.hop is None:
            raise InconsistentSnapshot(f"ring {ring} names real {number}, which is {real}")
        if number in owners and real.state is RealState.DEAD:
            raise InconsistentSnapshot(f"ring {ring} sends new connections to real {number}, which is dead")


def _without(mapping: Mapping[K, V], keys: tuple[K, ...]) -> dict[K, V]:
    gone = set(keys)
    return {key: value for key, value in mapping.items() if key not in gone}
