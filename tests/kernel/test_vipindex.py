"""The index of VIPs only makes packets cheaper: with it, half of it or none the program answers alike."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbagent.core.model import LiveVip, Proto, VipKey
from lbagent.dataplane import abi, libbpf
from lbagent.dataplane.libbpf import XDP_PASS, XDP_TX
from lbagent.dataplane.vipindex import VipIndex, index_key, place
from tests.kernel.frames import CLIENT, frame, real_of
from tests.loaded import Loaded, word
from tests.vectors import Flow

KEYS = st.builds(
    VipKey,
    st.integers(1, 2**32 - 2).map(IPv4Address),
    st.integers(0, 65535),
    st.sampled_from(Proto),
)
VIPS = 4  # one real each: real n + 1 is VIP n's


@pytest.fixture
def edge(balancer: Loaded) -> Loaded:
    for number in range(VIPS):
        balancer.put_real(number + 1, vip=number)
        balancer.put_ring(word(number + 1), number)
    return balancer


@pytest.fixture
def index(edge: Loaded) -> Iterator[VipIndex]:
    """As a new program has it: no place says anything."""
    size = libbpf.map_info(edge.maps["vip_index"]).max_entries
    with libbpf.map_mmap(edge.maps["vip_index"], size * 16) as content:
        content[:] = bytes(len(content))
    index = VipIndex(edge.maps["vip_index"])
    yield index
    index.close()


def enter(edge: Loaded, key: VipKey, number: int) -> tuple[VipKey, LiveVip]:
    vip = LiveVip(number, 12, 0, 1)
    libbpf.map_update(edge.maps["vips"], abi.pack_vip_key(key), abi.pack_vip(vip))
    return key, vip


def delete(edge: Loaded, key: VipKey) -> None:
    libbpf.map_delete(edge.maps["vips"], abi.pack_vip_key(key))


def goes_to(edge: Loaded, key: VipKey) -> int | None:
    """VIP number, None: not for a VIP."""
    outcome = edge.run(frame(Flow(CLIENT, key.address, 40000, key.port, key.proto)))
    if outcome.verdict == XDP_PASS:
        return None
    assert outcome.verdict == XDP_TX
    return real_of(outcome.frame) - 1


def neighbour(key: VipKey, bits: int) -> VipKey:
    """Another key that belongs to the same place."""
    for n in range(1, 1 << 20):
        other = key._replace(address=IPv4Address((int(key.address) + n) % (1 << 32)))
        if place(index_key(other), bits) == place(index_key(key), bits):
            return other
    raise AssertionError("there is always one")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vips=st.dictionaries(KEYS, st.tuples(st.integers(0, VIPS - 1), st.booleans()), max_size=8),
    others=st.lists(KEYS, max_size=8),
)
def test_every_packet_finds_what_the_hash_holds(
    edge: Loaded, index: VipIndex, vips: dict[VipKey, tuple[int, bool]], others: list[VipKey]
) -> None:
    """Those VIPs marked True go again."""
    libbpf.map_delete_keys(edge.maps["vips"], list(libbpf.map_keys(edge.maps["vips"])))
    index.learn([])
    all_of_them = {key: number for key, (number, _) in vips.items()}
    left = {key: number for key, (number, goes) in vips.items() if not goes}
    gone = all_of_them.keys() - left.keys()

    def finds(held: dict[VipKey, int]) -> bool:
        asked = [*vips, *others]
        return [goes_to(edge, key) for key in asked] == [held.get(key) for key in asked]

    assert finds({})
    index.forget(vips)
    assert finds({})
    entries = [enter(edge, key, number) for key, number in all_of_them.items()]
    assert finds(all_of_them)
    index.learn(entries)
    assert finds(all_of_them)
    index.forget(gone)
    assert finds(all_of_them)
    for key in gone:
        delete(edge, key)
    assert finds(left)
    index.learn((key, vip) for key, vip in entries if key in left)
    assert finds(left)


def test_the_hash_is_spared_where_the_index_knows(edge: Loaded, index: VipIndex) -> None:
    """Seen by letting them contradict each other, which never happens otherwise."""
    key, other = (
        VipKey(IPv4Address("203.0.113.1"), 80, Proto.TCP),
        VipKey(IPv4Address("203.0.113.2"), 80, Proto.TCP),
    )
    index.learn([enter(edge, key, 1)])
    delete(edge, key)
    enter(edge, other, 2)
    assert goes_to(edge, key) == 1
    assert goes_to(edge, other) is None


def test_vips_that_share_a_place_are_told_apart_by_the_hash(edge: Loaded, index: VipIndex) -> None:
    bits = libbpf.map_info(edge.maps["vip_index"]).max_entries.bit_length() - 1
    key = VipKey(IPv4Address("203.0.113.1"), 80, Proto.TCP)
    second, third = neighbour(key, bits), neighbour(neighbour(key, bits), bits)
    entries = [enter(edge, key, 1), enter(edge, second, 2)]
    index.learn(entries)
    assert [goes_to(edge, k) for k in (key, second, third)] == [1, 2, None]
    index.forget([key])
    delete(edge, key)
    index.learn(entries[1:])
    assert [goes_to(edge, k) for k in (key, second, third)] == [None, 2, None]


def test_a_vip_that_changes_its_ring_is_found_with_the_new_one(edge: Loaded, index: VipIndex) -> None:
    key = VipKey(IPv4Address("203.0.113.1"), 80, Proto.TCP)
    index.learn([enter(edge, key, 1)])
    index.forget([key])
    assert goes_to(edge, key) == 1
    index.learn([enter(edge, key, 2)])
    assert goes_to(edge, key) == 2


def test_a_new_writer_trusts_nothing_that_it_finds(edge: Loaded, index: VipIndex) -> None:
    key = VipKey(IPv4Address("203.0.113.1"), 80, Proto.TCP)
    index.learn([enter(edge, key, 1)])
    delete(edge, key)
    VipIndex(edge.maps["vip_index"]).learn([])
    assert goes_to(edge, key) is None
