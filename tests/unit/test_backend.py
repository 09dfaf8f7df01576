"""What `lbagent backend` changes on a node, and how it takes that back: the plans, without a node."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from lbagent.backend import Follower
from lbagent.core.dsr import (
    Action,
    AddAddress,
    Attach,
    Change,
    DelAddress,
    Detach,
    Lease,
    Node,
    Record,
    Registration,
    SetSysctl,
    Tell,
    Untell,
    asked,
    keys,
    needs,
    next_end,
    note,
    plan,
    renew,
    takes_back,
    undo,
)
from lbagent.errors import LinkError

VIPS = [IPv4Address(f"203.0.113.{n}") for n in range(1, 4)]
VIP, VIP_2, VIP_3 = VIPS
DEVICES = ["eth0", "eth1"]
FRESH = dict.fromkeys(keys(DEVICES), 0)
nodes = st.builds(
    Node,
    st.frozensets(st.sampled_from(VIPS)),
    st.just(frozenset()),
    st.fixed_dictionaries({key: st.integers(0, 2) for key in keys(DEVICES)}),
    st.just(frozenset()),
)
wishes = st.tuples(st.frozensets(st.sampled_from(VIPS)), st.frozensets(st.sampled_from(DEVICES)))


def act(node: Node, action: Action) -> Node:
    """What the kernel makes of an action."""
    match action:
        case SetSysctl(key, old, new):
            assert node.sysctls[key] == old
            return replace(node, sysctls={**node.sysctls, key: new})
        case Attach(device):
            return replace(node, attached=node.attached | {device})
        case Detach(device):
            return replace(node, attached=node.attached - {device})
        case Tell(address):
            return replace(node, told=node.told | {address})
        case Untell(address):
            return replace(node, told=node.told - {address})
        case AddAddress(address):
            return replace(node, addresses=node.addresses | {address})
        case DelAddress(address):
            return replace(node, addresses=node.addresses - {address})


def carry_out(node: Node, record: Record, steps: Iterable[Action]) -> tuple[Node, Record]:
    for action in steps:
        node, record = act(node, action), note(record, action)
    return node, record


@given(nodes, st.lists(wishes, max_size=4))
def test_all_is_taken_back_exactly_whatever_was_wanted_in_between(
    before: Node, history: list[tuple[frozenset[IPv4Address], frozenset[str]]]
) -> None:
    node, record = before, Record()
    for vips, devices in history:
        node, record = carry_out(node, record, plan(node, record, vips, devices))
        assert node.told == vips
        assert node.attached == devices
        assert node.addresses == before.addresses | vips
        assert needs(node.sysctls, devices) == {}
        assert plan(node, record, vips, devices) == []
    node, record = carry_out(node, record, undo(node, record))
    assert node == before
    assert record == Record()


@given(nodes, wishes, wishes, st.data())
def test_a_stop_at_any_moment_leaves_nothing_that_cannot_be_taken_back(
    before: Node,
    first: tuple[frozenset[IPv4Address], frozenset[str]],
    second: tuple[frozenset[IPv4Address], frozenset[str]],
    data: st.DataObject,
) -> None:
    node, record = carry_out(before, Record(), plan(before, Record(), *first))
    steps = plan(node, record, *second)
    stop = data.draw(st.integers(0, len(steps)))
    node, record = carry_out(node, record, steps[:stop])
    if stop < len(steps):  # half done: the file is written before what adds, after what takes back
        action = steps[stop]
        written_first = not takes_back(record, action)
        if data.draw(st.booleans()):
            if written_first:
                record = note(record, action)
            else:
                node = act(node, action)
    node, record = carry_out(node, record, undo(node, record))
    assert node == replace(before, told=node.told)


def test_arp_is_silent_before_an_address_comes() -> None:
    steps = plan(
        Node(frozenset(), frozenset(), FRESH, frozenset()), Record(), frozenset({VIP}), frozenset({"eth0"})
    )
    assert steps == [
        SetSysctl("all/arp_ignore", 0, 1),
        SetSysctl("all/arp_announce", 0, 2),
        Attach("eth0"),
        Tell(VIP),
        AddAddress(VIP),
    ]


def test_a_strict_filter_becomes_loose_and_other_settings_stay() -> None:
    assert needs(FRESH | {"all/arp_ignore": 2, "all/arp_announce": 2}, DEVICES) == {}
    assert needs(FRESH | {"all/arp_ignore": 1, "all/arp_announce": 2, "eth1/rp_filter": 1}, DEVICES) == {
        "eth1/rp_filter": 2
    }
    strict_everywhere = FRESH | {"all/arp_ignore": 1, "all/arp_announce": 2, "all/rp_filter": 1}
    assert needs(strict_everywhere | {"eth0/rp_filter": 2}, DEVICES) == {"eth1/rp_filter": 2}


def test_an_address_that_was_there_before_is_never_removed() -> None:
    node = Node(frozenset({VIP}), frozenset({VIP}), FRESH, frozenset())
    assert DelAddress(VIP) not in plan(node, Record(), frozenset(), frozenset())
    assert undo(node, Record()) == [Untell(VIP)]


def test_what_somebody_else_set_meanwhile_is_left_as_they_want_it() -> None:
    record = Record(frozenset({VIP}), {"all/arp_ignore": Change(0, 1)}, frozenset({"eth0"}))
    assert undo(Node(frozenset(), frozenset(), FRESH | {"all/arp_ignore": 2}, frozenset()), record) == []


def test_a_sysctl_that_is_set_twice_goes_back_to_its_first_value() -> None:
    record = note(note(Record(), SetSysctl("all/arp_ignore", 0, 1)), SetSysctl("all/arp_ignore", 0, 2))
    assert record.sysctls == {"all/arp_ignore": Change(0, 2)}


def test_a_vip_lingers_after_its_last_instance() -> None:
    leases = renew({}, {VIP: 10.0, VIP_2: 0.0}, 100.0)
    assert next_end(leases) is None
    leases = renew(leases, {VIP_3: 5.0}, 101.0)
    assert leases == {VIP: Lease(10.0, 101.0), VIP_3: Lease(5.0, None)}
    assert next_end(leases) == 111.0
    assert renew(leases, {VIP_3: 5.0}, 110.9).keys() == {VIP, VIP_3}
    assert renew(leases, {VIP_3: 5.0}, 111.0).keys() == {VIP_3}


def test_a_vip_that_comes_back_in_time_stays() -> None:
    leases = renew({VIP: Lease(10.0, 100.0)}, {VIP: 10.0}, 105.0)
    assert leases == {VIP: Lease(10.0, None)}


def registered(id_: str, linger: str | None = None, vip: str = str(VIP)) -> Registration:
    meta = {"lb-vip": vip} | ({"lb-linger": linger} if linger else {})
    return Registration("web", id_, 80, ("lb",), meta)


def test_registrations_ask_for_their_vips_with_the_longest_linger() -> None:
    found = asked(
        [registered("a", "10s"), registered("b", "20s"), registered("c", None, str(VIP_2))], {}, 300
    )
    assert found.vips == {VIP: 20, VIP_2: 300}
    assert found.problems == {}


def test_a_registration_that_makes_no_sense_keeps_the_vip_it_had() -> None:
    before = asked([registered("a")], {}, 300)
    wrong = [registered("a", vip="nonsense"), registered("b", vip="nonsense")]
    found = asked(wrong, before.options, 300)
    assert found.vips == {VIP: 300}
    assert found.problems.keys() == {"a", "b"}
    assert asked([], found.options, 300).vips == {}


class FakeBackend:
    """Notes what it was to serve; fails as often as it is told to."""

    def __init__(self, *added: IPv4Address, failures: int = 0) -> None:
        self._added = frozenset(added)
        self.served: list[set[IPv4Address]] = []
        self.has_served = threading.Event()
        self.failures = failures

    @property
    def added(self) -> frozenset[IPv4Address]:
        return self._added

    def serve(self, vips: frozenset[IPv4Address]) -> None:
        if self.failures:
            self.failures -= 1
            raise LinkError("not now")
        self.served.append(set(vips))
        self.has_served.set()


async def test_until_consul_answers_the_vips_of_the_run_before_stay() -> None:
    backend = FakeBackend(VIP)
    follower = Follower(backend, 300, clock=lambda: 0.0)
    assert await follower.serve() is None
    follower.emit([registered("a", vip=str(VIP_2))])
    assert await follower.serve() == 300
    assert backend.served == [{VIP}, {VIP, VIP_2}]


async def test_a_vip_is_removed_when_its_linger_time_is_over() -> None:
    now = 0.0
    backend = FakeBackend()
    follower = Follower(backend, 300, clock=lambda: now)
    follower.emit([registered("a", "10s")])
    assert await follower.serve() is None
    follower.emit([])
    assert await follower.serve() == 10
    now = 9.0
    assert await follower.serve() == 1
    now = 10.0
    assert await follower.serve() is None
    assert backend.served == [{VIP}, {VIP}, {VIP}, set()]


async def test_a_change_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbagent.backend.RETRY_S", (0.0, 0.0))
    backend = FakeBackend(failures=3)
    follower = Follower(backend, 300)
    follower.emit([registered("a")])
    task = asyncio.create_task(follower.run())
    assert await asyncio.to_thread(backend.has_served.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.served == [{VIP}]


async def test_what_is_wrong_with_a_registration_is_told_once() -> None:
    follower = Follower(FakeBackend(), 300)
    with capture_logs() as logs:
        for _ in range(2):
            follower.emit([registered("a", vip="nonsense")])
    assert [(entry["event"], entry["id"], entry["kept"]) for entry in logs] == [
        ("registration_refused", "a", False)
    ]


def test_the_record_grows_with_each_change_and_shrinks_with_what_takes_it_back() -> None:
    address = IPv4Address("203.0.113.7")
    there_and_back: list[tuple[Action, Action]] = [
        (Attach("eth0"), Detach("eth0")),
        (AddAddress(address), DelAddress(address)),
        (SetSysctl("all/arp_ignore", 0, 1), SetSysctl("all/arp_ignore", 1, 0)),
    ]
    for there, back in there_and_back:
        grown = note(Record(), there)
        assert grown != Record()
        assert not takes_back(Record(), there)
        assert takes_back(grown, back)
        assert note(grown, back) == Record()
    assert note(grown, Tell(address)) == note(grown, Untell(address)) == grown
