"""What must hold after every step: `judge` sees each way in which what a packet can reach is incomplete."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lbagent.core import slots
from lbagent.core.model import ForgetFlows, Live, RealState, RingId, Snapshot, WriteReals
from lbagent.core.plan import plan
from lbagent.core.steps import advance, judge
from lbagent.errors import InconsistentSnapshot
from tests.snapshots import CAPACITY, SEED, backend, vip

RING = RingId(0, 12)


@pytest.fixture
def live() -> Live:
    """One VIP with two backends, numbers 1 and 2."""
    found = Live(CAPACITY)
    for step in plan(found, Snapshot((vip("web", backend(1), backend(2)),)), SEED, 0):
        found = advance(found, step)
    return found


def test_what_a_plan_leaves_is_complete(live: Live) -> None:
    judge(live)
    judge(replace(live, records={1: 5}))


def test_a_vip_without_its_ring_is_seen(live: Live) -> None:
    with pytest.raises(InconsistentSnapshot, match="not there"):
        judge(replace(live, rings={}))


def test_a_ring_of_the_wrong_size_is_seen(live: Live) -> None:
    with pytest.raises(InconsistentSnapshot, match="bytes"):
        judge(replace(live, rings={RING: live.rings[RING][:-8]}))


@pytest.mark.parametrize("change", [{"state": RealState.FREE}, {"vip": 1}, {"hop": None}])
def test_an_owner_that_cannot_serve_the_vip_is_seen(live: Live, change: dict[str, object]) -> None:
    broken = replace(live.reals[1], **change)  # type: ignore[arg-type]  # one field of its own type each
    with pytest.raises(InconsistentSnapshot, match="real 1"):
        judge(advance(live, WriteReals({1: broken})))


def test_a_real_that_was_never_written_is_seen(live: Live) -> None:
    with pytest.raises(InconsistentSnapshot, match="real 2"):
        judge(replace(live, reals={1: live.reals[1]}))


def test_a_dead_owner_is_seen_and_a_dead_elder_is_fine(live: Live) -> None:
    dead = advance(live, WriteReals({1: replace(live.reals[1], state=RealState.DEAD)}))
    with pytest.raises(InconsistentSnapshot, match="dead"):
        judge(dead)
    all_two = slots.renumber(bytes([1, 0, 0, 0]) * 4096, [2])
    judge(replace(dead, rings={RING: slots.succeed(live.rings[RING], all_two, set(), 7)}))


def test_a_freed_real_that_records_name_is_seen(live: Live) -> None:
    free = replace(live.reals[1], address=live.reals[1].address + 8, state=RealState.FREE)
    with pytest.raises(InconsistentSnapshot, match="flow records"):
        judge(replace(live, reals={**live.reals, 9: free}, records={9: 1}))


def test_forgetting_flows_changes_nothing_else(live: Live) -> None:
    assert advance(live, ForgetFlows((bytes(40),))) is live
