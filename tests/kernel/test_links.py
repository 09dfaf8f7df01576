"""The node's network as the kernel has it: programs on devices, addresses, and ways that change."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lbagent import links
from lbagent.core.model import Hop
from lbagent.errors import LinkError
from tests.world.net import Host, Net, ip, net

PATIENCE_S = 10.0
REAL = IPv4Address("10.77.0.2")
ELSEWHERE = IPv4Address("192.0.2.9")

# ---- programs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Iterator[Net]:
    with net() as made:
        made.add_host("edge", 1)
        made.add_host("real", 2)
        yield made


@pytest.fixture
def edge(world: Net) -> Iterator[Host]:
    yield world["edge"]
    world["edge"].call(lambda: links.detach("eth0"))


@contextlib.contextmanager
def program() -> Iterator[tuple[int, int]]:
    """Descriptor and id of an XDP program that passes everything."""
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
    fd = ctypes.CDLL("libbpf.so.1").bpf_prog_load(6, b"pass", b"GPL", code, ctypes.c_size_t(2), None)
    assert fd >= 0, os.strerror(-fd)
    try:
        found = re.search(r"^prog_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
        assert found is not None
        yield fd, int(found[1])
    finally:
        os.close(fd)


def anyones(_: int) -> bool:
    return True


def test_native_mode_comes_first(edge: Host) -> None:
    with program() as (fd, number):
        assert edge.call(lambda: links.attached("eth0")) is None
        assert edge.call(lambda: links.attach("eth0", fd)) == "native"
        assert edge.call(lambda: links.attached("eth0")) == ("native", number)
        edge.call(lambda: links.detach("eth0"))
        assert edge.call(lambda: links.attached("eth0")) is None


def test_a_program_of_ours_is_replaced(edge: Host) -> None:
    with program() as (old, old_id), program() as (new, new_id):
        edge.call(lambda: links.attach("eth0", old))
        assert edge.call(lambda: links.attach("eth0", new, ours=lambda n: n == old_id)) == "native"
        assert edge.call(lambda: links.attached("eth0")) == ("native", new_id)


def test_a_foreign_program_is_named_and_left_alone(edge: Host) -> None:
    with program() as (foreign, number), program() as (fd, _):
        edge.call(lambda: links.attach("eth0", foreign))
        with pytest.raises(LinkError, match=rf"eth0 .*not lbagent's: id {number}\b"):
            edge.call(lambda: links.attach("eth0", fd, ours=lambda n: n != number))
        assert edge.call(lambda: links.attached("eth0")) == ("native", number)


def test_a_device_without_native_support_gets_generic_mode_and_a_warning(world: Net) -> None:
    bridge = world["bridge"]
    with program() as (fd, number), capture_logs() as logs:
        assert bridge.call(lambda: links.attach("br0", fd)) == "generic"
        assert bridge.call(lambda: links.attached("br0")) == ("generic", number)
        assert bridge.call(lambda: links.attach("br0", fd, ours=anyones)) == "generic"
        bridge.call(lambda: links.detach("br0"))
        with pytest.raises(LinkError, match="br0: cannot attach an XDP program in native mode"):
            bridge.call(lambda: links.attach("br0", fd, "native"))
        assert bridge.call(lambda: links.attached("br0")) is None
    assert [(entry["event"], entry["log_level"], entry["device"]) for entry in logs] == [
        ("xdp_generic_mode", "warning", "br0")
    ] * 2
    assert "skb" in logs[0]["cost"]


def test_the_mode_can_be_changed_both_ways(edge: Host) -> None:
    with program() as (fd, number):
        edge.call(lambda: links.attach("eth0", fd))
        assert edge.call(lambda: links.attach("eth0", fd, "generic", anyones)) == "generic"
        assert edge.call(lambda: links.attached("eth0")) == ("generic", number)
        assert edge.call(lambda: links.attach("eth0", fd, "native", anyones)) == "native"
        assert edge.call(lambda: links.attached("eth0")) == ("native", number)


def test_a_mode_that_the_driver_refuses_leaves_the_program_running_as_it_did(world: Net) -> None:
    bridge = world["bridge"]
    with program() as (fd, number):
        bridge.call(lambda: links.attach("br0", fd, "generic"))
        with pytest.raises(LinkError, match="native"):
            bridge.call(lambda: links.attach("br0", fd, "native", anyones))
        assert bridge.call(lambda: links.attached("br0")) == ("generic", number)
        bridge.call(lambda: links.detach("br0"))


@pytest.mark.parametrize("call", [links.attached, links.detach, lambda name: links.attach(name, 0)])
def test_a_missing_device_is_named_with_those_that_exist(edge: Host, call: Callable[[str], object]) -> None:
    with pytest.raises(LinkError, match=r"no network device 'eth7'; there are: eth0, lo"):
        edge.call(lambda: call("eth7"))


def test_addresses_are_put_on_a_device_and_taken_off_again(edge: Host) -> None:
    vip = IPv4Address("203.0.113.1")
    before = edge.call(lambda: links.addresses("lo"))
    assert IPv4Interface("127.0.0.1/8") in before
    for _ in range(2):
        edge.call(lambda: links.add_address("lo", vip))
        assert edge.call(lambda: links.addresses("lo")) == before | {IPv4Interface(vip)}
    for _ in range(2):
        edge.call(lambda: links.del_address("lo", vip))
        assert edge.call(lambda: links.addresses("lo")) == before


# ---- next hops ----------------------------------------------------------------------------------


class Follower:
    """What NextHops tells, kept in order of arrival. `hold` makes it deaf for a while."""

    def __init__(self, host: Host) -> None:
        self.seen: dict[IPv4Address, Hop | None] = {}
        self.told: list[Mapping[IPv4Address, Hop | None]] = []
        self.errors: list[BaseException] = []
        self.hold = threading.Event()
        self.hold.set()
        self._queue: queue.Queue[Mapping[IPv4Address, Hop | None]] = queue.Queue()
        self.hops = links.NextHops()
        host.call(lambda: self.hops.start(self._on_change, self.errors.append))

    def _on_change(self, changed: Mapping[IPv4Address, Hop | None]) -> None:
        self._queue.put(changed)
        self.hold.wait(PATIENCE_S)

    def until(self, address: IPv4Address, holds: Callable[[Hop | None], bool]) -> Hop | None:
        while address not in self.seen or not holds(self.seen[address]):
            changed = self._queue.get(timeout=PATIENCE_S)
            self.told.append(changed)
            self.seen.update(changed)
        return self.seen[address]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbagent.core.hops.REVALIDATE_S", 0.2)
    monkeypatch.setattr("lbagent.core.hops.RETRY_S", (0.1, 0.2))


@pytest.fixture
def lab() -> Iterator[Net]:
    """edge and real have a second wire between them, and the kernel notices soon when a neighbour is gone."""
    with net() as made:
        edge, real = made.add_host("edge", 1), made.add_host("real", 2)
        ip(f"-n {edge.namespace} link add eth1 type veth peer name eth1 netns {real.namespace}")
        for host, number in ((edge, 1), (real, 2)):
            ip(f"-n {host.namespace} addr add 10.88.0.{number}/24 dev eth1")
            ip(f"-n {host.namespace} link set eth1 mtu 1400 up")
            host.sysctl("ipv4/conf/eth0/arp_notify", "1")
        for device in ("eth0", "eth1"):
            edge.sysctl(f"ipv4/neigh/{device}/base_reachable_time_ms", "200")
            edge.sysctl(f"ipv4/neigh/{device}/delay_first_probe_time", "0")
            edge.sysctl(f"ipv4/neigh/{device}/retrans_time_ms", "50")
            edge.sysctl(f"ipv4/neigh/{device}/locktime", "0")
        yield made


@pytest.fixture
def follower(lab: Net, fast: None) -> Iterator[Follower]:
    made = Follower(lab["edge"])
    yield made
    made.hold.set()
    made.hops.stop()
    assert made.errors == []


def mac(host: Host, device: str = "eth0") -> bytes:
    return bytes.fromhex(host.call(lambda: _link_address(device)).replace(":", ""))


def _link_address(device: str) -> str:
    return ip(f"-o link show dev {device}").split("link/ether ")[1].split()[0]


def index(host: Host, device: str) -> int:
    return int(host.call(lambda: ip(f"-o link show dev {device}")).split(":")[0])


def hop(lab: Net, device: str = "eth0", mtu: int = 1500) -> Hop:
    edge, real = lab["edge"], lab["real"]
    return Hop(mac(real, device), mac(edge, device), index(edge, device), mtu)


def is_known(found: Hop | None) -> bool:
    return found is not None


def is_unknown(found: Hop | None) -> bool:
    return found is None


def test_the_hop_of_a_real_on_the_wire_is_found_and_told_once(lab: Net, follower: Follower) -> None:
    nobody = IPv4Address("10.77.0.99")
    follower.hops.want([REAL, nobody])
    assert follower.until(REAL, is_known) == hop(lab)
    assert follower.seen[nobody] is None
    assert follower.told == [{REAL: None, nobody: None}, {REAL: hop(lab)}]


def test_the_neighbours_new_mac_is_followed(lab: Net, follower: Follower) -> None:
    follower.hops.want([REAL])
    follower.until(REAL, is_known)
    ip(f"-n {lab['real'].namespace} link set eth0 address 02:00:00:00:77:77")
    found = follower.until(REAL, lambda found: found is not None and found.dmac == b"\x02\0\0\0\x77\x77")
    assert found == hop(lab)


def test_our_own_new_mac_is_followed(lab: Net, follower: Follower) -> None:
    follower.hops.want([REAL])
    follower.until(REAL, is_known)
    ip(f"-n {lab['edge'].namespace} link set eth0 address 02:00:00:00:66:66")
    found = follower.until(REAL, lambda found: found is not None and found.smac == b"\x02\0\0\0\x66\x66")
    assert found == hop(lab)


def test_a_route_through_a_gateway_is_followed_to_another_device(lab: Net, follower: Follower) -> None:
    edge = lab["edge"].namespace
    follower.hops.want([ELSEWHERE])
    follower.until(ELSEWHERE, is_unknown)
    ip(f"-n {edge} route add 192.0.2.0/24 via 10.77.0.2 mtu 1450")
    assert follower.until(ELSEWHERE, is_known) == hop(lab, mtu=1450)
    ip(f"-n {edge} route replace 192.0.2.0/24 via 10.88.0.2")
    moved = hop(lab, "eth1", 1400)
    assert follower.until(ELSEWHERE, lambda found: found == moved)
    ip(f"-n {edge} route del 192.0.2.0/24")
    follower.until(ELSEWHERE, is_unknown)


def test_a_next_hop_object_that_changes_is_followed(lab: Net, follower: Follower) -> None:
    edge = lab["edge"].namespace
    lab["edge"].sysctl("ipv4/nexthop_compat_mode", "0")  # else routes are told with their next hops
    ip(f"-n {edge} nexthop add id 7 via 10.77.0.2 dev eth0")
    ip(f"-n {edge} route add 192.0.2.0/24 nhid 7")
    follower.hops.want([ELSEWHERE])
    assert follower.until(ELSEWHERE, is_known) == hop(lab)
    ip(f"-n {edge} nexthop replace id 7 via 10.88.0.2 dev eth1")
    moved = hop(lab, "eth1", 1400)
    assert follower.until(ELSEWHERE, lambda found: found == moved)


def test_a_gateway_of_ipv6_is_resolved(lab: Net, follower: Follower) -> None:
    for host, number in ((lab["edge"], 1), (lab["real"], 2)):
        host.sysctl("ipv6/conf/eth1/disable_ipv6", "0")
        ip(f"-n {host.namespace} addr add fe80::{number}/64 dev eth1 nodad")
    ip(f"-n {lab['edge'].namespace} route add 192.0.2.0/24 via inet6 fe80::2 dev eth1")
    follower.hops.want([ELSEWHERE])
    assert follower.until(ELSEWHERE, is_known) == hop(lab, "eth1", 1400)


def test_a_neighbour_that_dies_is_unknown_until_it_is_back(lab: Net, follower: Follower) -> None:
    real = lab["real"].namespace
    follower.hops.want([REAL])
    follower.until(REAL, is_known)
    ip(f"-n {real} link set eth0 down")
    follower.until(REAL, is_unknown)
    ip(f"-n {real} link set eth0 up")
    assert follower.until(REAL, is_known) == hop(lab)


def test_our_device_that_goes_down_takes_its_hops_until_it_is_up_again(lab: Net, follower: Follower) -> None:
    edge = lab["edge"].namespace
    follower.hops.want([REAL])
    follower.until(REAL, is_known)
    ip(f"-n {edge} link set eth0 down")
    follower.until(REAL, is_unknown)
    ip(f"-n {edge} link set eth0 up")
    assert follower.until(REAL, is_known) == hop(lab)


def test_a_flushed_neighbour_is_found_again(lab: Net, follower: Follower) -> None:
    edge = lab["edge"].namespace
    follower.hops.want([REAL])
    follower.until(REAL, is_known)
    ip(f"-n {edge} neigh flush dev eth0")
    ip(f"-n {edge} link set eth0 mtu 1300")  # a mark: all that came before it has been taken in
    mark = hop(lab, mtu=1300)
    assert follower.until(REAL, lambda found: found == mark)


def test_an_entry_set_by_hand_stays_as_it_was_set(lab: Net, follower: Follower) -> None:
    edge = lab["edge"].namespace
    by_hand = IPv4Address("10.77.0.50")
    ip(f"-n {edge} neigh add {by_hand} lladdr 02:00:00:00:50:50 dev eth0 nud permanent")
    follower.hops.want([by_hand])
    follower.until(by_hand, is_known)
    follower.hops.want([by_hand, REAL])  # a mark: by now its first turn to be asked has passed
    follower.until(REAL, is_known)
    assert "PERMANENT" in ip(f"-n {edge} neigh show {by_hand}")


def test_a_real_on_this_very_host_has_no_hop(lab: Net, follower: Follower) -> None:
    ours = IPv4Address("10.77.0.1")
    follower.hops.want([ours, REAL])
    follower.until(REAL, is_known)
    assert follower.seen[ours] is None


def test_lost_events_are_made_up_for_by_reading_everything_again(
    lab: Net, fast: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lbagent.links.netlink.RECEIVE_BUFFER", 1)  # the kernel makes it a few KiB
    edge = lab["edge"].namespace
    ip(f"-n {edge} route add 192.0.2.0/24 via 10.77.0.2")
    follower = Follower(lab["edge"])
    try:
        follower.hops.want([ELSEWHERE])
        follower.until(ELSEWHERE, is_known)
        follower.hold.clear()
        ip(f"-n {edge} link set eth0 mtu 1300")
        follower.until(ELSEWHERE, lambda found: found is not None and found.mtu == 1300)
        flood = tmp_path / "routes"
        flood.write_text("".join(f"route add 198.51.100.{n}/32 via 10.77.0.2\n" for n in range(250)))
        ip(f"-n {edge} -batch {flood}")
        ip(f"-n {edge} route replace 192.0.2.0/24 via 10.88.0.2")
        with capture_logs() as logs:
            follower.hold.set()
            moved = hop(lab, "eth1", 1400)
            assert follower.until(ELSEWHERE, lambda found: found == moved)
    finally:
        follower.hold.set()
        follower.hops.stop()
    assert follower.errors == []
    assert "netlink_events_lost" in [entry["event"] for entry in logs]
