"""Which hop a real has, from routes, neighbours and devices as netlink tells them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.core.hops import RETRY_S, REVALIDATE_S, Device, Hops, Neighbour, NeighbourKey, Nud, Route
from lbagent.core.model import Hop

ETH0, ETH1 = 2, 3
OWN, OWN_1 = b"\x02\0\0\0\0\xfe", b"\x02\0\0\0\0\xfd"
MAC, OTHER = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"
REAL, REAL_2 = IPv4Address("10.77.0.11"), IPv4Address("10.88.0.12")
GATEWAY = IPv4Address("10.77.0.1")
DIRECT = Route(NeighbourKey(ETH0, REAL), 0)
VIA = Route(NeighbourKey(ETH0, GATEWAY), 0)
HOP = Hop(MAC, OWN, ETH0, 1500)


def made(*routes: tuple[IPv4Address, Route | None]) -> Hops:
    """eth0 is up; these reals are wanted and routed."""
    hops = Hops()
    hops.device(ETH0, Device(OWN, 1500))
    hops.want([address for address, _ in routes])
    hops.unrouted()
    for address, route in routes:
        hops.routed(address, route)
    return hops


def known(route: Route = DIRECT, state: Nud = Nud.REACHABLE) -> Hops:
    """REAL has a hop, which was told, and the first ask is done."""
    hops = made((REAL, route))
    hops.neighbour(route.to, state, MAC)
    assert hops.changes() == {REAL: Hop(MAC, OWN, ETH0, 1500)}
    hops.due(0.0)
    return hops


def reroute(hops: Hops, route: Route | None) -> None:
    for address in hops.unrouted():
        hops.routed(address, route)


def test_a_wanted_real_is_looked_up_and_told_once_even_while_unknown() -> None:
    hops = Hops()
    hops.device(ETH0, Device(OWN, 1500))
    hops.want([REAL])
    assert hops.unrouted() == (REAL,)
    assert hops.unrouted() == ()
    hops.routed(REAL, DIRECT)
    assert hops.changes() == {REAL: None}
    assert hops.changes() == {}
    hops.neighbour(DIRECT.to, Nud.REACHABLE, MAC)
    assert hops.changes() == {REAL: HOP}


def test_an_unreachable_real_is_told_as_unknown() -> None:
    assert made((REAL, None)).changes() == {REAL: None}


@pytest.mark.parametrize("state", [Nud.REACHABLE, Nud.STALE, Nud.DELAY, Nud.PROBE, Nud.PERMANENT, Nud.NOARP])
def test_a_neighbour_is_used_in_every_state_that_has_a_mac(state: Nud) -> None:
    known(state=state)


def test_going_stale_is_no_news() -> None:
    hops = known()
    for state in (Nud.STALE, Nud.DELAY, Nud.PROBE, Nud.REACHABLE):
        hops.neighbour(DIRECT.to, state, MAC)
        assert hops.changes() == {}


def test_a_new_mac_is_news() -> None:
    hops = known()
    hops.neighbour(DIRECT.to, Nud.REACHABLE, OTHER)
    assert hops.changes() == {REAL: HOP._replace(dmac=OTHER)}


def test_a_failed_neighbour_takes_the_hop_and_is_asked_again_at_once() -> None:
    hops = known()
    hops.neighbour(DIRECT.to, Nud.FAILED, MAC)
    assert hops.changes() == {REAL: None}
    assert hops.due(1.0) == [DIRECT.to]
    hops.neighbour(DIRECT.to, Nud.INCOMPLETE, None)
    assert hops.changes() == {}
    hops.neighbour(DIRECT.to, Nud.REACHABLE, MAC)
    assert hops.changes() == {REAL: HOP}


def test_a_flushed_neighbour_keeps_its_mac_until_asking_again_has_failed() -> None:
    hops = known()
    hops.forget_neighbour(DIRECT.to)
    hops.neighbour(DIRECT.to, Nud.INCOMPLETE, None)
    assert hops.changes() == {}
    assert hops.due(0.5) == [DIRECT.to]
    hops.neighbour(DIRECT.to, Nud.FAILED, None)
    assert hops.changes() == {REAL: None}


def test_a_neighbour_flushed_by_hand_keeps_its_mac_too() -> None:
    hops = known()
    hops.neighbour(DIRECT.to, Nud.FAILED, None)
    hops.forget_neighbour(DIRECT.to)
    assert hops.changes() == {}
    hops.neighbour(DIRECT.to, Nud.FAILED, None)
    assert hops.changes() == {REAL: None}
    hops.forget_neighbour(DIRECT.to)
    assert hops.changes() == {}


def test_a_kept_mac_is_forgotten_with_the_last_real_behind_it() -> None:
    hops = known()
    hops.forget_neighbour(DIRECT.to)
    hops.want([])
    hops.want([REAL])
    reroute(hops, DIRECT)
    assert hops.changes() == {REAL: None}


def test_all_reals_behind_a_gateway_follow_it() -> None:
    hops = made((REAL, VIA), (REAL_2, VIA))
    hops.neighbour(VIA.to, Nud.REACHABLE, MAC)
    assert hops.changes() == {REAL: HOP, REAL_2: HOP}
    hops.neighbour(VIA.to, Nud.REACHABLE, OTHER)
    assert hops.changes().keys() == {REAL, REAL_2}
    hops.want([REAL])
    hops.neighbour(VIA.to, Nud.REACHABLE, MAC)
    assert hops.changes() == {REAL: HOP}


def test_a_gateway_may_speak_ipv6() -> None:
    known(Route(NeighbourKey(ETH0, IPv6Address("fe80::1")), 0))


def test_a_route_change_moves_the_hop() -> None:
    hops = known()
    hops.device(ETH1, Device(OWN_1, 9000))
    hops.unrouted()
    hops.reroute(IPv4Network("10.77.0.0/24"))
    moved = Route(NeighbourKey(ETH1, REAL), 0)
    hops.neighbour(moved.to, Nud.STALE, OTHER)
    reroute(hops, moved)
    assert hops.changes() == {REAL: Hop(OTHER, OWN_1, ETH1, 9000)}
    hops.neighbour(DIRECT.to, Nud.FAILED, None)
    assert hops.changes() == {}


def test_the_same_route_again_is_no_news() -> None:
    hops = known()
    hops.routed(REAL, DIRECT)
    assert hops.changes() == {}


def test_a_neighbour_that_fails_without_ever_having_answered_is_no_news() -> None:
    hops = made((REAL, DIRECT))
    assert hops.changes() == {REAL: None}
    hops.neighbour(DIRECT.to, Nud.FAILED, None)
    assert hops.changes() == {}


def test_only_reals_in_the_network_of_a_changed_route_are_looked_up() -> None:
    hops = made((REAL, DIRECT), (REAL_2, VIA))
    hops.reroute(IPv4Network("10.88.0.0/16"))
    assert hops.unrouted() == (REAL_2,)
    hops.reroute(IPv4Network("192.0.2.0/24"))
    assert hops.unrouted() == ()
    hops.reroute(IPv4Network("0.0.0.0/0"))
    assert set(hops.unrouted()) == {REAL, REAL_2}


def test_a_lost_route_takes_the_hop() -> None:
    hops = known()
    hops.reroute_all()
    reroute(hops, None)
    assert hops.changes() == {REAL: None}


def test_the_mtu_is_the_routes_but_never_more_than_the_devices_or_a_header_can_say() -> None:
    hops = known()
    hops.routed(REAL, DIRECT._replace(mtu=1400))
    assert hops.changes() == {REAL: HOP._replace(mtu=1400)}
    hops.routed(REAL, DIRECT._replace(mtu=9000))
    assert hops.changes() == {REAL: HOP}
    hops.routed(REAL, DIRECT)
    hops.device(ETH0, Device(OWN, 1 << 17))
    assert hops.changes() == {REAL: HOP._replace(mtu=0xFFFF)}


def test_a_device_that_goes_down_takes_its_hops_and_what_was_known_behind_it() -> None:
    hops = known()
    hops.device(ETH1, Device(OWN_1, 1500))
    hops.neighbour(NeighbourKey(ETH1, GATEWAY), Nud.STALE, MAC)
    hops.device(ETH0, None)
    assert hops.unrouted() == (REAL,)
    assert hops.changes() == {REAL: None}
    assert hops.due(0.0) == []
    hops.device(ETH0, Device(OWN, 1500))
    assert hops.due(0.1) == [DIRECT.to]
    assert hops.changes() == {}
    hops.neighbour(DIRECT.to, Nud.REACHABLE, MAC)
    assert hops.changes() == {REAL: HOP}


def test_a_device_that_changes_without_going_down_keeps_routes_and_neighbours() -> None:
    hops = known()
    hops.device(ETH0, Device(OWN, 1500))
    assert hops.changes() == {}
    hops.device(ETH0, Device(OWN_1, 1400))
    assert hops.unrouted() == ()
    assert hops.changes() == {REAL: Hop(MAC, OWN_1, ETH0, 1400)}


def test_resolution_backs_off_and_a_known_neighbour_is_revalidated() -> None:
    hops = made((REAL, DIRECT))
    assert hops.next_due_s() == 0.0
    at, waits = 100.0, []
    for _ in range(6):
        assert hops.due(at) == [DIRECT.to]
        assert hops.due(at) == []
        due = hops.next_due_s()
        assert due is not None
        waits.append(due - at)
        at = due
    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert (waits[0], waits[-1]) == RETRY_S
    hops.neighbour(DIRECT.to, Nud.STALE, MAC)
    assert hops.due(at) == [DIRECT.to]
    assert hops.next_due_s() == at + REVALIDATE_S


def test_a_neighbour_set_by_hand_is_never_asked() -> None:
    hops = made((REAL, DIRECT))
    hops.neighbour(DIRECT.to, Nud.PERMANENT, MAC)
    assert hops.due(0.0) == []


def test_nobody_is_asked_for_a_real_that_is_not_wanted_any_more() -> None:
    hops = made((REAL, DIRECT))
    hops.want([REAL_2])
    assert hops.due(0.0) == []
    assert hops.next_due_s() is None
    assert hops.unrouted() == (REAL_2,)


def test_reading_the_tables_anew_finds_what_events_did_not_tell() -> None:
    hops = made((REAL, DIRECT), (REAL_2, Route(NeighbourKey(ETH1, REAL_2), 0)))
    hops.device(ETH1, Device(OWN_1, 1500))
    hops.neighbour(DIRECT.to, Nud.REACHABLE, MAC)
    hops.neighbour(NeighbourKey(ETH0, GATEWAY), Nud.REACHABLE, MAC)
    hops.neighbour(NeighbourKey(ETH1, REAL_2), Nud.REACHABLE, MAC)
    hops.changes()
    hops.devices({ETH0: Device(OWN, 1400)})
    hops.neighbours({DIRECT.to: Neighbour(Nud.REACHABLE, OTHER)})
    assert hops.changes() == {REAL: Hop(OTHER, OWN, ETH0, 1400), REAL_2: None}


KEYS = [NeighbourKey(dev, address) for dev in (ETH0, ETH1) for address in (REAL, REAL_2, GATEWAY)]
ROUTES = [None, *(Route(key, mtu) for key in KEYS for mtu in (0, 1400))]
facts = st.one_of(
    st.tuples(st.just("want"), st.sets(st.sampled_from([REAL, REAL_2, GATEWAY]))),
    st.tuples(st.just("route"), st.sampled_from([REAL, REAL_2, GATEWAY]), st.sampled_from(ROUTES)),
    st.tuples(st.just("device"), st.sampled_from([ETH0, ETH1]), st.sampled_from([None, Device(OWN, 1500)])),
    st.tuples(
        st.just("neighbour"),
        st.sampled_from(KEYS),
        st.sampled_from([Nud.STALE, Nud.FAILED]),
        st.sampled_from([MAC, OTHER]),
    ),
    st.tuples(st.just("tell")),
)


@given(st.lists(facts, max_size=40))
def test_what_was_told_is_always_what_the_tables_say(history: list[tuple[object, ...]]) -> None:
    hops = Hops()
    wanted: set[IPv4Address] = set()
    routes: dict[IPv4Address, Route | None] = {}
    devices: dict[int, Device] = {}
    macs: dict[NeighbourKey, bytes] = {}
    told: dict[IPv4Address, Hop | None] = {}
    for fact in [*history, ("tell",)]:
        match fact:
            case ("want", set(addresses)):
                wanted = addresses
                hops.want(addresses)
            case ("route", IPv4Address() as address, (Route() | None) as route):
                routes[address] = route
                hops.reroute(IPv4Network(address))
            case ("device", int(ifindex), None):
                devices.pop(ifindex, None)
                macs = {key: mac for key, mac in macs.items() if key.ifindex != ifindex}
                hops.device(ifindex, None)
            case ("device", int(ifindex), Device() as device):
                devices[ifindex] = device
                hops.device(ifindex, device)
            case ("neighbour", NeighbourKey() as key, Nud() as state, bytes(mac)) if key.ifindex in devices:
                macs.pop(key, None)
                if state is Nud.STALE:
                    macs[key] = mac
                hops.neighbour(key, state, mac)
            case ("tell",):
                for address in hops.unrouted():
                    hops.routed(address, routes.get(address))
                told = {a: hop for a, hop in told.items() if a in wanted} | hops.changes()
                assert told == {a: expected(routes.get(a), devices, macs) for a in wanted}


def expected(route: Route | None, devices: dict[int, Device], macs: dict[NeighbourKey, bytes]) -> Hop | None:
    if route is None or route.to.ifindex not in devices or route.to not in macs:
        return None
    device = devices[route.to.ifindex]
    return Hop(macs[route.to], device.mac, route.to.ifindex, route.mtu or device.mtu)
