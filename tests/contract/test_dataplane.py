"""What every data plane must do alike; run against the fake and against the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbagent.core import slots
from lbagent.core.model import (
    Announce,
    ClearReals,
    DropRings,
    ForgetFlows,
    Live,
    LiveVip,
    RealState,
    RingId,
    SettleSlots,
    Snapshot,
    Step,
    SwapRings,
    Withdraw,
    WriteReals,
)
from lbagent.core.plan import plan
from lbagent.core.steps import advance
from lbagent.errors import DataplaneError
from tests.contract.conftest import Subject
from tests.snapshots import HOPS, SEED, backend, snapshots, view, vip

WEB = vip("web", backend(1), backend(2), backend(3), protos="both")


def used(live: Live) -> dict[int, object]:
    return {n: real for n, real in live.reals.items() if real.state is not RealState.FREE}


def same(found: Live, expected: Live) -> None:
    assert dict(found.vips) == dict(expected.vips)
    assert dict(found.rings) == dict(expected.rings)
    assert used(found) == used(expected)


def reach(subject: Subject, want: Snapshot, now_s: int = 100) -> Live:
    """Plan from what is read back, apply, and hold what is then read against the meaning of the steps."""
    live = subject.dataplane.read()
    for step in plan(live, want, SEED, now_s):
        subject.dataplane.apply(step)
        live = advance(live, step)
    found = subject.dataplane.read()
    same(found, live)
    return found


def test_a_new_data_plane_is_empty(subject: Subject) -> None:
    live = subject.dataplane.read()
    assert not live.vips and not live.rings and not used(live) and live.records is None
    assert subject.dataplane.records().count == 0


def test_what_is_applied_is_read_back(subject: Subject) -> None:
    live = reach(subject, Snapshot((WEB,)))
    assert set(live.vips) == set(WEB.keys)
    assert plan(live, Snapshot((WEB,)), SEED, 200) == ()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(snapshots(), min_size=1, max_size=3))
def test_any_history_is_read_back_as_the_steps_mean_it(subject: Subject, wants: list[Snapshot]) -> None:
    subject.clear()
    for turn, want in enumerate(wants):
        reach(subject, want, 100 * turn)


def test_every_step_alone_is_read_back(subject: Subject) -> None:
    live = reach(subject, Snapshot((WEB,)))
    ring = RingId(0, 12)
    drained = slots.succeed(live.rings[ring], slots.renumber(bytes(4 << 12), []), set(), 7)
    grown = slots.resize(drained, 12, 14)
    assert grown is not None
    bigger = {key: replace(entry, ring_bits=14) for key, entry in live.vips.items()}
    steps: list[Step] = [
        WriteReals({1: replace(live.reals[1], hop=HOPS[3])}),
        WriteReals({1: replace(live.reals[1], hop=HOPS[2])}),
        SwapRings({ring: drained}),
        SettleSlots(ring, (0, 1, 4095)),
        SwapRings({RingId(0, 14): grown}),
        Announce(bigger),
        DropRings((ring,)),
        WriteReals({2: replace(live.reals[2], state=RealState.DEAD)}),
        Withdraw(WEB.keys[:1]),
        Withdraw(WEB.keys[1:]),
        DropRings((RingId(0, 14),)),
        ClearReals((1, 2, 3)),
    ]
    for step in steps:
        subject.dataplane.apply(step)
        live = advance(live, step)
        same(subject.dataplane.read(), live)


def test_a_cleared_real_keeps_its_generation(subject: Subject) -> None:
    live = reach(subject, Snapshot((WEB,)))
    reach(subject, Snapshot())
    subject.dataplane.apply(ClearReals((1,)))
    subject.dataplane.apply(WriteReals({1: replace(live.reals[1], generation=41)}))
    subject.dataplane.apply(ClearReals((1,)))
    assert subject.dataplane.read().reals[1].generation == 41


def test_flow_records_are_listed_and_forgotten(subject: Subject) -> None:
    subject.put_flows({bytes([n]) * 40: bytes([n]) * 24 for n in range(1, 200)})
    found = subject.dataplane.records()
    assert found.count == 199 and len(found.keys) == 199 * 40 and len(found.values) == 199 * 24
    keys = {found.keys[i * 40 : i * 40 + 40] for i in range(199)}
    assert keys == {bytes([n]) * 40 for n in range(1, 200)}
    subject.dataplane.apply(ForgetFlows(tuple(bytes([n]) * 40 for n in range(1, 199))))
    assert subject.dataplane.records().keys == bytes([199]) * 40


def test_forgetting_a_flow_that_is_gone_is_no_error(subject: Subject) -> None:
    subject.dataplane.apply(ForgetFlows((bytes(40),)))


def test_counters_start_at_zero_for_a_new_vip_and_real(subject: Subject) -> None:
    reach(subject, Snapshot((WEB,)))
    counters = subject.dataplane.counters()
    assert counters.vips == {0: (0, 0)} and counters.reals == dict.fromkeys((1, 2, 3), (0, 0))


@pytest.mark.parametrize("number", [0, 64, 10**6])
def test_a_real_number_outside_the_map_is_refused(subject: Subject, number: int) -> None:
    live = reach(subject, Snapshot((WEB,)))
    with pytest.raises(DataplaneError, match="reals"):
        subject.dataplane.apply(WriteReals({number: live.reals[1]}))
    same(subject.dataplane.read(), live)


def test_a_vip_number_outside_the_map_is_refused(subject: Subject) -> None:
    live = reach(subject, Snapshot((WEB,)))
    with pytest.raises(DataplaneError, match="rings"):
        subject.dataplane.apply(SwapRings({RingId(16, 12): live.rings[RingId(0, 12)]}))
    with pytest.raises(DataplaneError, match="vips"):
        subject.dataplane.apply(Announce({WEB.keys[0]: LiveVip(16, 12, 0, 1)}))
    same(subject.dataplane.read(), live)


def test_the_clock_is_monotonic(subject: Subject) -> None:
    first = subject.dataplane.now_ns()
    assert subject.dataplane.now_ns() >= first > 0


def test_views_agree_with_what_was_wanted(subject: Subject) -> None:
    live = reach(subject, Snapshot((WEB,)))
    for seen in view(live).values():
        assert {str(owner) for owner, _, _ in seen} == {"10.77.0.1", "10.77.0.2", "10.77.0.3"}
