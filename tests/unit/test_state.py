"""What is remembered: the last good options, who departed and when, and that an error changes nothing."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core.instances import Instance, judge
from lbagent.core.model import UDP_STATELESS, Live, LiveVip, Proto, Real, RealState, RingId, VipKey, claimant
from lbagent.core.options import LONGEST_S, Options
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
from tests.catalog import EMPTY, HOP, VIP, events, failures, instance, ip, told, web

KEY = VipKey(ip(VIP), 80, Proto.TCP)


def live_web(*hosts: int, dead: tuple[int, ...] = (), service: str = "web", number: int = 0) -> Live:
    reals = {
        number * 10 + n: Real(
            ip(f"10.0.0.{n}"), number, 0, RealState.DEAD if n in dead else RealState.SERVING, HOP
        )
        for n in (*hosts, *dead)
    }
    entry = LiveVip(number, 14, 0, claimant(service))
    return replace(EMPTY, vips={KEY: entry}, rings={RingId(number, 14): b""}, reals=reals)


# ---- options of a service -----------------------------------------------------------------------


def test_the_most_common_valid_options_count_and_who_differs_is_flagged() -> None:
    found = judge([instance(1, linger="1s"), instance(2), instance(3), instance(4, proto="nonsense")], None)
    assert found.options == Options(ip(VIP), 80)
    assert {key[0] for key in found.doubts} == {"n1", "n4"}
    assert len(found.speakers) == 4
    assert not found.problem


def test_of_equally_common_options_those_of_the_lowest_instance_count() -> None:
    found = judge([instance(2), instance(1, linger="1s")], None)
    assert found.options is not None
    assert found.options.linger_s == 1


def test_without_valid_options_the_last_good_ones_stay_and_the_problem_shows() -> None:
    state = told(web(instance(1)), web(instance(1, vip="nonsense")))
    service = state.services["web"]
    assert service.options == Options(ip(VIP), 80)
    assert list(service.speakers) == [ip("10.0.0.1")]
    assert "the last good ones stay" in service.problem
    assert any('lb-vip is "nonsense"' in text for text in service.doubts["n1", "i1"])


def test_a_service_that_never_had_valid_options_has_no_backends() -> None:
    service = told(web(instance(1, vip=""))).services["web"]
    assert service.options is None
    assert not service.speakers
    assert "so it has no VIP" in service.problem


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (instance(9, port=81), "its port 81 is not the VIP's port 80"),
        (instance(9, address="fd00::1"), "no IPv4 address"),
        (instance(9, address="example.com"), "no IPv4 address"),
        (instance(9, address="127.0.0.1"), "loopback"),
        (instance(9, address=VIP), "the VIP itself"),
        (instance(9, vip="203.0.113.2"), "asks for VIP 203.0.113.2"),
        (instance(9, address="10.0.0.1"), "has the same address and speaks for it"),
    ],
)
def test_an_instance_that_cannot_be_a_backend_says_why(odd: Instance, why: str) -> None:
    found = judge([instance(1), instance(2), odd], None)
    assert set(found.speakers) == {ip("10.0.0.1"), ip("10.0.0.2")}
    assert why in " ".join(found.doubts["n9", "i9"])


def test_of_instances_with_one_address_the_healthiest_speaks() -> None:
    one = instance(1, Standing.CRITICAL)
    two = instance(2, Standing.WARNING, address="10.0.0.1")
    assert judge([one, two], None).speakers[ip("10.0.0.1")] is two


@settings(deadline=None)
@given(st.permutations([instance(n, linger=f"{n % 2}s") for n in range(1, 5)]))
def test_the_order_of_instances_does_not_matter(shuffled: list[Instance]) -> None:
    assert judge(shuffled, None) == judge(sorted(shuffled, key=str), None)


# ---- departed -----------------------------------------------------------------------------------


def departed(state: State, name: str = "web") -> dict[IPv4Address, float]:
    return {address: d.at for address, d in state.services[name].departed.items()}


def test_a_deregistered_instance_departs_once_and_comes_back() -> None:
    state = told(web(instance(1), instance(2), at=1), web(instance(1), at=2), web(instance(1), at=3))
    assert departed(state) == {ip("10.0.0.2"): 2}
    assert departed(told(web(instance(1), instance(2), at=4), state=state)) == {}


def test_an_instance_that_moves_to_another_address_departs_from_the_old_one() -> None:
    state = told(web(instance(1), at=1), web(instance(1, address="10.0.0.5"), at=2))
    assert departed(state) == {ip("10.0.0.1"): 2}


def test_what_departed_longer_ago_than_any_linger_time_is_forgotten() -> None:
    state = told(web(instance(1), at=1), web(at=2), CatalogAnswered(frozenset(), 3))
    assert departed(state) == {ip("10.0.0.1"): 2}
    assert ip("10.0.0.1") in state.hops
    state = told(CatalogAnswered(frozenset(), 3 + LONGEST_S), state=state)
    assert not state.services
    assert not state.hops


# ---- Consul's failures and drains ---------------------------------------------------------------


def test_errors_are_counted_shown_and_over_with_the_next_good_answer() -> None:
    state = told(web(instance(1)), ConsulFailed("web", "HTTP 500", 2), ConsulFailed(None, "timeout", 2))
    assert (state.services["web"].error, state.error, state.errors) == ("HTTP 500", "timeout", 2)
    state = told(web(instance(1), at=3), CatalogAnswered(frozenset({"web"}), 3), state=state)
    assert (state.services["web"].error, state.error, state.errors) == ("", "", 2)
    assert state.services["web"].answer_at == state.answer_at == 3


@settings(deadline=None)
@given(st.lists(events(5.0)), failures(6.0))
def test_an_error_changes_nothing_that_counts(history: list[Event], failure: ConsulFailed) -> None:
    before = told(*history)
    after = fold(before, failure)
    for name, service in before.services.items():
        assert replace(after.services[name], error="") == replace(service, error="")
    same = replace(after, services=before.services, error=before.error, errors=before.errors)
    assert same == before


@settings(deadline=None)
@given(st.lists(events(5.0), max_size=6), st.randoms())
def test_the_order_of_events_on_different_services_does_not_matter(
    history: list[Event], random: Random
) -> None:
    answers = {e.service: e for e in history if isinstance(e, ServiceAnswered)}
    shuffled = list(answers.values())
    random.shuffle(shuffled)
    assert told(*answers.values()) == told(*shuffled)


def test_drains_are_kept_by_service_node_and_id() -> None:
    drain = Drained("web", "n1", "i1", "disk", 7.0)
    state = told(drain)
    assert state.drains == {("web", "n1", "i1"): drain}
    assert told(Undrained("web", "n1", "i2"), state=state) == state
    assert told(Undrained("web", "n1", "i1"), state=state).drains == {}
    assert told(IntentsLoaded((drain,))).drains == state.drains


def test_next_hops_are_kept_until_they_change() -> None:
    state = told(HopsChanged({ip("10.0.0.1"): None}))
    assert state.hops[ip("10.0.0.1")] is None
    assert state.hops[ip("10.0.0.2")] == HOP


# ---- what was there at the start ----------------------------------------------------------------


def test_found_backends_that_consul_does_not_know_depart_with_its_first_answer() -> None:
    state = told(Adopted(live_web(1, 2, dead=(3,)), 50), web(instance(1), at=60))
    assert departed(state) == {ip("10.0.0.2"): 60}
    assert not state.legacy


def test_it_does_not_matter_whether_the_kernel_or_consul_was_read_first() -> None:
    adopted, answer = Adopted(live_web(1, 2), 60), web(instance(1), at=60)
    failure, catalog = ConsulFailed("api", "HTTP 500", 60), CatalogAnswered(frozenset({"web"}), 60)
    facts: list[Event] = [adopted, answer, failure, catalog]
    first, *others = (
        replace(told(*order), hops={})
        for order in permutations(facts)
        if order.index(failure)
        > order.index(catalog)  # a service that nobody lists is forgotten, error and all
    )
    assert departed(first) == {ip("10.0.0.2"): 60}
    assert first.full_at == 60
    assert all(other == first for other in others)


def test_options_that_the_kernel_shows_serve_a_service_without_valid_ones() -> None:
    live = live_web(1)
    udp = KEY._replace(proto=Proto.UDP)
    live = replace(live, vips={KEY: live.vips[KEY], udp: replace(live.vips[KEY], flags=UDP_STATELESS)})
    service = told(Adopted(live, 50), web(instance(1, vip="nonsense"))).services["web"]
    assert service.options == Options(ip(VIP), 80, (Proto.TCP, Proto.UDP), ring_bits=14)
    assert list(service.speakers) == [ip("10.0.0.1")]


def test_a_found_service_that_consul_never_lists_departs_with_the_first_full_answer() -> None:
    state = told(Adopted(live_web(1, service="old"), 50), CatalogAnswered(frozenset({"web"}), 60))
    assert state.full_at == 0
    assert state.legacy
    state = told(web(instance(2), at=70), state=state)
    assert state.full_at == 70
    assert departed(state, unnamed_service(claimant("old"))) == {ip("10.0.0.1"): 70}
    state = told(ServiceAnswered("old", (instance(1),), 80), state=state)
    assert set(state.services) == {"old", "web"}
    assert departed(state, "old") == {}


def test_a_departed_service_that_comes_back_keeps_its_departed() -> None:
    state = told(Adopted(live_web(1, service="old"), 50), CatalogAnswered(frozenset(), 60))
    state = told(ServiceAnswered("old", (instance(2),), 80), state=state)
    assert departed(state, "old") == {ip("10.0.0.1"): 60}
