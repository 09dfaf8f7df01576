"""What a backend's state means for its connections, and that the want is always consistent and calm."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core.desired import HOP_GRACE_S, Defaults, Desired, ServiceView, check, desired
from lbagent.core.model import (
    UDP_STATELESS,
    Backend,
    Duty,
    Live,
    Proto,
    Snapshot,
    Vip,
    VipKey,
    claimant,
)
from lbagent.core.plan import plan
from lbagent.core.state import (
    Adopted,
    CatalogAnswered,
    ConsulFailed,
    Drained,
    Event,
    HopsChanged,
    IntentsLoaded,
    ServiceAnswered,
    State,
    Undrained,
    fold,
    unnamed_service,
)
from lbagent.core.status import Standing
from lbagent.core.steps import advance
from lbagent.errors import InconsistentSnapshot
from tests.catalog import EMPTY, HOP, VIP, applied, events, failures, instance, ip, told, web

DEFAULTS = Defaults(settle_s=300, linger_s=60)
KEY = VipKey(ip(VIP), 80, Proto.TCP)
T = TypeVar("T")


def some(value: T | None) -> T:
    assert value is not None
    return value


def wish(state: State, live: Live = EMPTY, now: float = 100.0) -> Desired:
    found = desired(state, live, DEFAULTS, now)
    check(found.want)
    return found


def the(found: Desired, name: str = "web") -> ServiceView:
    return next(view for view in found.services if view.name == name)


def duties(found: Desired, name: str = "web") -> dict[str, Duty]:
    vip = next((vip for vip in found.want.vips if vip.service == name), None)
    return {str(b.address).removeprefix("10.0.0."): b.duty for b in vip.backends} if vip else {}


# ---- duties -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("standing", "duty", "weight"),
    [
        (Standing.PASSING, Duty.ACTIVE, 5),
        (Standing.WARNING, Duty.ACTIVE, 2),
        (Standing.MAINTENANCE, Duty.DRAINING, 5),
        (Standing.CRITICAL, Duty.DEAD, 5),
    ],
)
def test_health_decides_over_old_and_new_connections(standing: Standing, duty: Duty, weight: int) -> None:
    found = wish(told(web(instance(1, standing, weights=(5, 2)))))
    backend = found.want.vips[0].backends[0]
    assert (backend.duty, backend.weight, backend.hop) == (duty, weight, HOP)
    assert the(found).backends[0].standing is standing
    assert the(found).backends[0].weight == weight


def test_a_service_may_keep_connections_to_a_critical_backend() -> None:
    assert duties(wish(told(web(instance(1, Standing.CRITICAL, on_critical="keep"))))) == {"1": Duty.DRAINING}


def test_a_drained_backend_keeps_its_connections_even_when_critical_and_after_it_came_back() -> None:
    drain = Drained("web", "n1", "i1", "disk", 7.0)
    state = told(web(instance(1), instance(2)), drain)
    backend = the(wish(state)).backends[0]
    assert (backend.standing, backend.reason, backend.since) == (Standing.DRAINED, "disk", 7.0)
    assert duties(wish(state)) == {"1": Duty.DRAINING, "2": Duty.ACTIVE}
    state = told(web(instance(2)), web(instance(1, Standing.CRITICAL), instance(2)), state=state)
    assert duties(wish(state)) == {"1": Duty.DRAINING, "2": Duty.ACTIVE}
    assert "checks are critical" in " ".join(the(wish(state)).backends[0].problems)
    state = told(Undrained("web", "n1", "i1"), state=state)
    assert duties(wish(state))["1"] is Duty.DEAD


def test_a_backend_without_a_known_next_hop_takes_no_new_connections_and_says_so() -> None:
    found = wish(told(web(instance(1)), HopsChanged({ip("10.0.0.1"): None})))
    assert found.want.vips[0].backends[0].share == 0
    assert "next hop" in " ".join(the(found).backends[0].problems)


def test_a_departed_backend_lingers_then_dies_while_the_kernel_has_it_then_is_gone() -> None:
    both = told(web(instance(1), instance(2), at=100))
    live = applied(EMPTY, wish(both).want)
    state = told(web(instance(1), at=110), state=both)
    assert duties(wish(state, live, 169)) == {"1": Duty.ACTIVE, "2": Duty.DRAINING}
    assert the(wish(state, live, 169)).backends[1].standing is Standing.GONE
    over = wish(state, live, 170)
    assert duties(over) == {"1": Duty.ACTIVE, "2": Duty.DEAD}
    assert duties(wish(state, applied(live, over.want, cleared=True), 170)) == {"1": Duty.ACTIVE}


def test_a_backend_that_was_critical_does_not_come_back_to_life_by_departing() -> None:
    state = told(web(instance(1), instance(2, Standing.CRITICAL)), web(instance(1)))
    assert duties(wish(state))["2"] is Duty.DEAD


def test_an_address_that_only_the_kernel_knows_dies() -> None:
    live = applied(EMPTY, wish(told(web(instance(1), instance(2)))).want)
    state = told(web(instance(1)))
    assert duties(wish(state, live)) == {"1": Duty.ACTIVE, "2": Duty.DEAD}
    assert (the(wish(state, live)).backends[1].node, the(wish(state, live)).backends[1].standing) == (
        "",
        Standing.GONE,
    )


# ---- VIPs ---------------------------------------------------------------------------------------


def test_options_become_the_vip() -> None:
    vip = wish(
        told(web(instance(1, proto="both", settle="9s", udp="stateless", ring_size="65536")))
    ).want.vips[0]
    keys = (KEY, KEY._replace(proto=Proto.UDP))
    assert vip == Vip("web", keys, vip.backends, 16, 9, UDP_STATELESS)


def test_the_ring_fits_the_registered_instances_whatever_their_health() -> None:
    state = told(web(*(instance(n, Standing.CRITICAL) for n in range(1, 50))))
    assert wish(state).want.vips[0].ring_bits == 14
    assert wish(told(web(instance(1)), state=state)).want.vips[0].ring_bits == 12


def test_a_vip_stays_until_its_last_backend_has_lingered() -> None:
    state = told(web(*(instance(n) for n in range(1, 50)), at=100))
    live = applied(EMPTY, wish(state).want)
    state = told(web(at=100), CatalogAnswered(frozenset(), 100), state=state)
    assert wish(state, live, 159).want.vips[0].ring_bits == 14
    over = wish(state, live, 160)
    assert over.want == Snapshot()
    assert {b.backend.duty for b in the(over).backends if b.backend} == {Duty.DEAD}
    assert not wish(state, EMPTY, 160).services


def test_a_service_without_valid_options_is_shown_but_not_served() -> None:
    found = wish(told(web(instance(1, vip=""))))
    assert not found.want.vips
    assert the(found).backends[0].standing is Standing.REFUSED
    assert the(found).backends[0].weight == 0
    assert "lb-vip is missing" in the(found).backends[0].problems[0]


def test_instances_that_are_all_refused_leave_no_vip() -> None:
    found = wish(told(web(instance(1, address="fd00::1"))))
    assert not found.want.vips
    assert "no IPv4 address" in the(found).backends[0].problems[0]


def test_failures_of_consul_show_where_they_belong() -> None:
    state = told(web(instance(1)), ConsulFailed("web", "HTTP 500", 2), ConsulFailed(None, "timeout", 2))
    assert the(wish(state)).problems == ("Consul: HTTP 500",)
    assert wish(state).problems == ("Consul: timeout",)
    assert the(wish(told(ConsulFailed("api", "HTTP 403", 2))), "api").vip is None


# ---- what was there at the start ----------------------------------------------------------------


def started(*services: str) -> tuple[State, Live]:
    """A new agent that found "old" (10.0.0.1, and .2 dead) and `services` (10.0.0.3) in the kernel."""
    old = ServiceAnswered("old", (instance(1), instance(2, Standing.CRITICAL)), 1)
    others = [ServiceAnswered(n, (instance(3, vip=f"203.0.113.{7 + i}"),), 1) for i, n in enumerate(services)]
    dead = applied(EMPTY, wish(told(replace(old, instances=(instance(1), instance(2))), *others)).want)
    live = applied(dead, wish(told(old, *others), dead).want)
    return fold(State(), Adopted(live, 1000)), live


def test_what_was_found_stays_as_it_is_until_consul_speaks_of_it() -> None:
    state, live = started("web")
    found = wish(state, live, 1001)
    assert {vip.service for vip in found.want.vips} == {unnamed_service(claimant(n)) for n in ("old", "web")}
    assert all(vip.held for vip in found.want.vips)
    assert applied(live, found.want) == live
    state = fold(state, CatalogAnswered(frozenset({"web"}), 1002))
    assert "web" in {view.name for view in wish(state, live, 1002).services}
    state = fold(state, ConsulFailed("web", "HTTP 500", 1003))
    view = the(wish(state, live, 1e6))
    assert view.vip is not None
    assert view.problems[0] == "Consul: HTTP 500"
    assert view.backends[0].standing is Standing.ADOPTED
    assert applied(live, wish(state, live, 1e6).want) == live


def test_held_backends_follow_their_next_hops() -> None:
    state, live = started()
    hop = HOP._replace(ifindex=9)
    found = wish(fold(state, HopsChanged({ip("10.0.0.1"): hop})), live)
    assert [backend.hop for backend in found.want.vips[0].backends] == [hop, HOP]
    assert [backend.duty for backend in found.want.vips[0].backends] == [Duty.ACTIVE, Duty.DEAD]


def test_what_consul_never_lists_lingers_from_its_first_full_answer() -> None:
    state, live = started("web")
    name = unnamed_service(claimant("old"))
    state = told(
        CatalogAnswered(frozenset({"web"}), 2000), web(instance(3, vip="203.0.113.7"), at=2000), state=state
    )
    assert duties(wish(state, live, 2059), name) == {"1": Duty.DRAINING, "2": Duty.DEAD}
    assert duties(wish(state, live, 2059)) == {"3": Duty.ACTIVE}
    assert [vip.service for vip in wish(state, live, 2060).want.vips] == ["web"]


def test_at_the_start_a_hop_found_in_the_kernel_counts_until_links_know_better() -> None:
    state, live = started()
    state = fold(state, ServiceAnswered("old", (instance(1), instance(2)), 1001))
    assert [b.hop for b in wish(state, live, 5000).want.vips[0].backends] == [HOP, HOP]
    state = fold(state, HopsChanged({ip("10.0.0.1"): None}))
    assert wish(state, live, 1000 + HOP_GRACE_S - 1).want.vips[0].backends[0].hop == HOP
    assert wish(state, live, 1000 + HOP_GRACE_S).want.vips[0].backends[0].hop is None


def planned(live: Live, want: Snapshot) -> Live:
    """What the kernel holds once the real plan is done."""
    for step in plan(live, want, seed=7, now_s=1):
        live = advance(live, step)
    return live


@settings(deadline=None)
@given(st.lists(events(5.0), max_size=8))
def test_a_new_agent_plans_nothing_until_consul_speaks(history: list[Event]) -> None:
    live = planned(EMPTY, wish(told(*history)).want)
    assert plan(live, wish(fold(State(), Adopted(live, 9)), live).want, seed=7, now_s=9) == ()


def test_a_new_agent_plans_nothing_when_consul_says_the_same_as_before() -> None:
    drain = Drained("web", "n3", "i3", "disk", 7.0)
    answer = web(
        instance(1, weights=(3, 1)),
        instance(2, Standing.CRITICAL),
        instance(3),
        instance(4, Standing.MAINTENANCE),
    )
    before = told(drain, web(*(instance(n) for n in range(1, 6))))
    live = planned(EMPTY, wish(before).want)
    live = planned(live, wish(told(answer, state=before), live).want)
    state = told(IntentsLoaded((drain,)), Adopted(live, 200), state=State())
    for event in (CatalogAnswered(frozenset({"web"}), 201), replace(answer, at=202)):
        state = fold(state, event)
        assert plan(live, wish(state, live, 203).want, seed=7, now_s=203) == ()
    assert state.full_at == 202


# ---- properties ---------------------------------------------------------------------------------

histories = st.lists(st.one_of(*(events(float(at)) for at in (1, 300, 390))), max_size=12)


@settings(deadline=None)
@given(histories, st.booleans())
def test_any_history_on_any_kernel_gives_a_consistent_want_that_fits(
    history: list[Event], adopts: bool
) -> None:
    live, state = replace(EMPTY, capacity=replace(EMPTY.capacity, vips=2, reals=5)), State()
    for n, event in enumerate(history):
        if adopts and n == len(history) // 2:
            state = fold(State(), Adopted(live, float(n)))
        state = fold(state, event)
        found = wish(state, live, now=float(n * 40))
        live = applied(live, found.want, cleared=n % 2 == 1)
        assert len({vip.number for vip in live.vips.values()}) <= 2
        assert max(live.reals, default=0) < 5
        names = {view.name for view in found.services}
        assert {vip.service for vip in found.want.vips} <= names


@settings(deadline=None)
@given(histories)
def test_a_want_that_is_applied_is_wanted_again(history: list[Event]) -> None:
    """Conflicts and lack of room are decided for good: nothing flaps."""
    state = told(*history)
    live = applied(replace(EMPTY, capacity=replace(EMPTY.capacity, vips=2, reals=5)), Snapshot())
    for _ in range(3):
        live = applied(live, wish(state, live, 400).want)
    assert applied(live, wish(state, live, 400).want) == live


@settings(deadline=None)
@given(histories, failures(500.0))
def test_an_error_never_changes_the_want(history: list[Event], failure: ConsulFailed) -> None:
    state = told(*history)
    assert wish(fold(state, failure), now=400).want == wish(state, now=400).want


@settings(deadline=None)
@given(histories)
def test_nobody_is_both_served_and_refused(history: list[Event]) -> None:
    for view in wish(told(*history), now=400).services:
        for backend in view.backends:
            assert (backend.standing is Standing.REFUSED) <= (backend.backend is None)
            assert (backend.standing is Standing.REFUSED) <= bool(backend.problems)


# ---- check --------------------------------------------------------------------------------------

ONE = Backend(ip("10.0.0.1"), 80, 1, Duty.ACTIVE, HOP)
TWO = replace(ONE, address=ip("10.0.0.2"))
GOOD = Vip("web", (KEY,), (ONE, TWO), 12)


@pytest.mark.parametrize(
    "vips",
    [
        (GOOD, replace(GOOD, keys=(KEY._replace(port=81),))),
        (GOOD, replace(GOOD, service="api")),
        (replace(GOOD, keys=()),),
        (replace(GOOD, keys=(KEY, KEY)),),
        (replace(GOOD, backends=(TWO, ONE)),),
        (replace(GOOD, backends=(ONE, ONE)),),
        (replace(GOOD, ring_bits=13),),
        (replace(GOOD, settle_s=0),),
        (replace(GOOD, backends=(replace(ONE, weight=-1),)),),
    ],
)
def test_an_inconsistent_snapshot_is_refused(vips: tuple[Vip, ...]) -> None:
    check(Snapshot((GOOD,)))
    with pytest.raises(InconsistentSnapshot):
        check(Snapshot(vips))
