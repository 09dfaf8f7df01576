"""The planner: every prefix of every plan leaves only complete things in reach of a packet."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core.model import (
    Announce,
    ClearReals,
    DropRings,
    Duty,
    ForgetFlows,
    Live,
    Proto,
    RealState,
    RingId,
    SettleSlots,
    Snapshot,
    Step,
    SwapRings,
    Vip,
    Withdraw,
    WriteReals,
)
from lbagent.core.plan import plan, sweep
from lbagent.core.steps import advance, judge
from lbagent.errors import InconsistentSnapshot
from tests.snapshots import CAPACITY, HOPS, SEED, backend, snapshots, view, vip

WEB3 = vip("web", backend(1), backend(2), backend(3))


def reach(live: Live, want: Snapshot, now_s: int = 1000) -> tuple[Live, tuple[Step, ...]]:
    """Apply the plan for `want`, judging after every step."""
    steps = plan(live, want, SEED, now_s)
    for step in steps:
        live = advance(live, step)
        judge(live)
    return live, steps


def rested(live: Live, now_s: int) -> Live:
    """As after a sweep that finds no flow record and every slot long settled."""
    found = sweep(live, b"", b"", 0, {v.number: 10 for v in live.vips.values()}, now_s * 10**9)
    for step in found.steps:
        live = advance(live, step)
        judge(live)
    return replace(live, records=found.records)


def owners(live: Live) -> set[str]:
    return {str(owner) for slots in view(live).values() for owner, _, _ in slots}


def drain_last(v: Vip) -> Vip:
    return replace(v, backends=(*v.backends[:-1], replace(v.backends[-1], duty=Duty.DRAINING)))


@settings(max_examples=100, deadline=None)
@given(st.lists(snapshots(), min_size=1, max_size=4))
def test_every_prefix_of_every_plan_is_complete(wants: list[Snapshot]) -> None:
    live = Live(CAPACITY)
    for turn, want in enumerate(wants):
        live, _ = reach(replace(live, records={}), want, 1000 * turn)
        assert plan(replace(live, records=None), want, SEED, 1000 * turn + 1) == ()


@settings(max_examples=100, deadline=None)
@given(snapshots(), snapshots(), st.integers(0, 8))
def test_a_plan_cut_short_and_planned_again_lands_in_the_same_place(
    first: Snapshot, second: Snapshot, cut: int
) -> None:
    live, _ = reach(Live(CAPACITY), first)
    whole, steps = reach(live, second, 2000)
    part = live
    for step in steps[:cut]:
        part = advance(part, step)
    again, _ = reach(part, second, 2000)
    assert again.vips.keys() == whole.vips.keys()
    stayed = {key for key, vip in live.vips.items() if vip.claimant == whole.vips.get(key, vip).claimant}
    found = view(again)
    for key, slots in view(whole).items():
        if key in stayed:
            assert found[key] == slots
        else:  # nobody has a connection to it yet: elders mean nothing
            assert [owner for owner, _, _ in found[key]] == [owner for owner, _, _ in slots]


@settings(max_examples=100, deadline=None)
@given(snapshots(), snapshots())
def test_a_plan_applied_twice_lands_in_the_same_place(first: Snapshot, second: Snapshot) -> None:
    live, _ = reach(Live(CAPACITY), first)
    once, steps = reach(live, second)
    twice = once
    for step in steps:
        twice = advance(twice, step)
    assert (view(twice), twice.reals, twice.rings) == (view(once), once.reals, once.rings)


@settings(max_examples=100, deadline=None)
@given(st.lists(snapshots(), min_size=1, max_size=4), snapshots())
def test_nothing_is_left_over_once_all_has_settled(wants: list[Snapshot], last: Snapshot) -> None:
    live = Live(CAPACITY)
    for turn, want in enumerate([*wants, last]):
        live, _ = reach(live, want, 100 * turn)
    for turn in range(3):
        live, _ = reach(rested(live, 100_000 + 1000 * turn), last, 100_000 + 1000 * turn)
    wanted = {(v.service, b.address) for v in last.vips for b in v.backends if b.duty is not Duty.DEAD}
    used = [real for real in live.reals.values() if real.state is not RealState.FREE]
    assert len(used) <= len(wanted)
    assert len(live.rings) == len(last.vips)
    assert not any(tracked for slots in view(live).values() for _, _, tracked in slots)


def test_a_first_announcement_makes_reals_then_ring_then_vip() -> None:
    live, steps = reach(Live(CAPACITY), Snapshot((WEB3,)))
    assert [type(step) for step in steps] == [WriteReals, SwapRings, Announce]
    assert owners(live) == {"10.77.0.1", "10.77.0.2", "10.77.0.3"}


def test_all_changed_rings_go_into_one_swap() -> None:
    both = Snapshot((vip("api", backend(1), backend(2), n=2), WEB3))
    live, _ = reach(Live(CAPACITY), both)
    drained = Snapshot(tuple(drain_last(v) for v in both.vips))
    _, steps = reach(live, drained)
    swaps = [step for step in steps if isinstance(step, SwapRings)]
    assert len(swaps) == 1 and len(swaps[0].rings) == 2


def test_a_drained_backend_keeps_its_real_and_becomes_elder() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    before = next(iter(view(live).values()))
    live, _ = reach(live, Snapshot((drain_last(WEB3),)), 2000)
    slots = next(iter(view(live).values()))
    assert {str(owner) for owner, _, _ in slots} == {"10.77.0.1", "10.77.0.2"}
    lost = [slot for slot, (owner, _, _) in zip(slots, before, strict=True) if str(owner) == "10.77.0.3"]
    assert lost
    assert all(str(elder) == "10.77.0.3" and tracked for _, elder, tracked in lost)
    assert "10.77.0.3" in {str(real.address) for real in live.reals.values()}


def test_a_dead_backend_leaves_no_tracked_slot_behind() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    before = next(iter(view(live).values()))
    dead = replace(WEB3, backends=(*WEB3.backends[:2], backend(3, duty=Duty.DEAD)))
    live, steps = reach(live, Snapshot((dead,)))
    assert [type(step) for step in steps] == [SwapRings, WriteReals]
    slots = next(iter(view(live).values()))
    lost = [slot for slot, (owner, _, _) in zip(slots, before, strict=True) if str(owner) == "10.77.0.3"]
    assert lost
    assert not any(tracked for _, _, tracked in lost)
    live, steps = reach(rested(live, 2000), Snapshot((dead,)))
    assert [type(step) for step in steps] == [ClearReals]


def test_a_real_is_not_cleared_while_a_record_names_it() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    without = Snapshot((replace(WEB3, backends=WEB3.backends[:2]),))
    live, _ = reach(live, without)
    live = rested(live, 5000)
    gone = next(n for n, real in live.reals.items() if str(real.address) == "10.77.0.3")
    assert plan(replace(live, records={gone: 1}), without, SEED, 5000) == ()
    assert plan(replace(live, records=None), without, SEED, 5000) == ()
    assert plan(live, without, SEED, 5000) == (ClearReals((gone,)),)


def test_a_sweep_forgets_what_is_silent_and_keeps_what_lives() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    live, _ = reach(live, Snapshot((drain_last(WEB3),)), 2000)
    content = live.rings[RingId(0, 12)]
    slot = next(n for n, (word,) in enumerate(struct.iter_unpack("<Q", content)) if word >> 63)
    keys = b"".join(bytes([n]) * 36 + bytes([Proto.TCP, 0, 0, 0]) for n in (1, 2))
    values = b"".join(
        struct.pack("<QIIIHBB", seen_s * 10**9, 3, slot << 20, 0, 0, 0, 0) for seen_s in (2000, 2400)
    )
    found = sweep(live, keys, values, 2, {0: 300}, 2500 * 10**9)
    assert found.records == {3: 1}
    assert found.steps[-1] == ForgetFlows((keys[:40],))
    settled = found.steps[0]
    assert isinstance(settled, SettleSlots)
    assert slot not in settled.slots


def test_a_slot_that_settles_leaves_no_record_behind() -> None:
    """Else it would be believed once the slot is tracked again, whatever its connection did meanwhile."""
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    live, _ = reach(live, Snapshot((drain_last(WEB3),)), 2000)
    words = [word for (word,) in struct.iter_unpack("<Q", live.rings[RingId(0, 12)])]
    slot = next(n for n, word in enumerate(words) if word >> 63)
    key = bytes([1]) * 36 + bytes([Proto.TCP, 0, 0, 0])
    value = struct.pack("<QIIIHBB", 2490 * 10**9, words[slot] & 0xFFFFF, slot << 20, 0, 0, 0, 0)
    found = sweep(live, key, value, 1, {0: 300}, 2500 * 10**9)
    assert [type(step) for step in found.steps] == [SettleSlots, ForgetFlows]
    assert found.records == {}


def test_a_real_is_not_cleared_while_older_connections_may_still_come_to_it() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    without = Snapshot((replace(WEB3, backends=WEB3.backends[:2]),))
    live, _ = reach(live, without)
    assert plan(replace(live, records={}), without, SEED, 5000) == (), "it is the elder of tracked slots"


def test_a_number_used_again_has_a_new_generation() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((vip("web", backend(1)),)))
    live, _ = reach(rested(live, 2000), Snapshot())
    live, _ = reach(rested(live, 3000), Snapshot())
    assert live.reals[1].state is RealState.FREE
    live, _ = reach(live, Snapshot((vip("web", backend(2)),)))
    assert live.reals[1].generation == 1
    assert str(live.reals[1].address) == "10.77.0.2"


def test_a_new_next_hop_is_written_in_place_without_a_swap() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    rehopped = replace(WEB3, backends=(*WEB3.backends[:2], backend(3, hop=HOPS[1])))
    live, steps = reach(live, Snapshot((rehopped,)))
    assert [type(step) for step in steps] == [WriteReals]
    assert HOPS[1] in {real.hop for real in live.reals.values()}


def test_a_lost_next_hop_takes_no_new_connections_and_keeps_the_old() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    lost = replace(WEB3, backends=(*WEB3.backends[:2], backend(3, hop=None)))
    live, _ = reach(live, Snapshot((lost,)))
    assert owners(live) == {"10.77.0.1", "10.77.0.2"}
    assert all(real.hop for real in live.reals.values())


def test_a_growing_ring_takes_a_new_place_before_the_vip_names_it() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    live, steps = reach(live, Snapshot((replace(WEB3, ring_bits=14),)))
    assert [type(step) for step in steps] == [SwapRings, Announce, DropRings]
    assert list(live.rings) == [RingId(0, 14)]


def test_a_ring_shrinks_only_when_nothing_is_lost() -> None:
    wide = replace(WEB3, ring_bits=14)
    live, _ = reach(Live(CAPACITY), Snapshot((wide,)))
    live, _ = reach(live, Snapshot((WEB3,)))
    assert list(live.rings) == [RingId(0, 14)], "old and new connections differ: the big ring stays"
    canonical = [slot[0] for slot in next(iter(view(live).values()))]
    live, _ = reach(rested(live, 5000), Snapshot((WEB3,)), 5000)
    assert list(live.rings) == [RingId(0, 12)]
    small = [slot[0] for slot in next(iter(view(live).values()))]
    assert canonical == [owner for owner in small for _ in range(4)]


def test_a_service_that_moves_to_another_address_keeps_its_ring() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    moved = replace(WEB3, keys=vip("web", n=9).keys)
    live, steps = reach(live, Snapshot((moved,)))
    assert [type(step) for step in steps] == [Withdraw, Announce]
    assert set(live.vips) == set(moved.keys)


def test_another_service_on_the_same_key_gets_a_ring_of_its_own() -> None:
    live, _ = reach(Live(CAPACITY), Snapshot((WEB3,)))
    other = vip("other", backend(4))
    live, steps = reach(live, Snapshot((other,)))
    assert [type(step) for step in steps] == [WriteReals, SwapRings, Announce, DropRings]
    assert owners(live) == {"10.77.0.4"}


def test_more_vips_than_numbers_are_refused() -> None:
    many = Snapshot(tuple(vip(f"s{n:02}", backend(1), n=n) for n in range(17)))
    with pytest.raises(InconsistentSnapshot, match="more VIPs"):
        plan(Live(CAPACITY), many, SEED, 0)


def test_more_reals_than_numbers_are_refused() -> None:
    with pytest.raises(InconsistentSnapshot, match="more reals"):
        plan(Live(CAPACITY), Snapshot((vip("web", *(backend(n) for n in range(1, 66))),)), SEED, 0)


def test_a_real_is_cleared_whatever_the_rings_of_other_vips_say() -> None:
    api = vip("api", backend(1), backend(2), n=2)
    live, _ = reach(Live(CAPACITY), Snapshot((api, WEB3)))
    without = Snapshot((api, replace(WEB3, backends=WEB3.backends[:2])))
    live, _ = reach(live, without, 2000)
    gone = next(n for n, real in live.reals.items() if str(real.address) == "10.77.0.3")
    assert plan(rested(live, 5000), without, SEED, 5000) == (ClearReals((gone,)),)
