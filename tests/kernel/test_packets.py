"""A packet in, a packet and a verdict out: what the balancer does to frames, whichever real it picks."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, IPOption_NOP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from lbagent.dataplane.libbpf import XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX
from tests.kernel.frames import CLIENT, ETHER, OPTIONS, TCP_FLOW, UDP_FLOW, encapsulated, frame
from tests.loaded import (
    OTHER_DEVICE,
    VIP,
    Loaded,
    Outcome,
    hop_to,
    real_address,
    slot_of,
    word,
)
from tests.vectors import VECTORS, Flow

OTHER_PORT = TCP_FLOW._replace(dport=81)


def passed(outcome: Outcome, sent: Any) -> bool:
    return outcome == (XDP_PASS, bytes(sent), {})


@pytest.fixture
def edge(balancer: Loaded) -> Loaded:
    """One VIP whose ring sends everything to real 3."""
    balancer.put_vip(0)
    balancer.put_real(3)
    balancer.put_ring(word(3))
    return balancer


# ---- for a VIP ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [TCP_FLOW, UDP_FLOW], ids=["tcp", "udp"])
@pytest.mark.parametrize("options", [[], OPTIONS], ids=["plain", "with options"])
def test_it_leaves_in_an_outer_header_for_the_real(edge: Loaded, flow: Flow, options: list[Any]) -> None:
    sent = frame(flow, options=options, tos=0xB9)
    assert edge.run(sent) == (XDP_TX, encapsulated(sent, flow, 3), {})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.integers(1, 2**32 - 2).map(IPv4Address),
    sport=st.integers(0, 65535),
    proto=st.sampled_from([6, 17]),
    payload=st.binary(max_size=1000),
    padding=st.binary(max_size=60),
    nops=st.integers(0, 40),
    tos=st.integers(0, 255),
    ttl=st.integers(1, 255),
    flags=st.sampled_from(["S", "SA", "A", "PA", "F", "R", "", "SF"]),
)
def test_any_sound_packet_does(
    edge: Loaded,
    source: IPv4Address,
    sport: int,
    proto: int,
    payload: bytes,
    padding: bytes,
    nops: int,
    tos: int,
    ttl: int,
    flags: str,
) -> None:
    flow = Flow(source, VIP, sport, 80, proto)
    sent = bytes(frame(flow, flags, payload, tos=tos, ttl=ttl, options=[IPOption_NOP()] * nops)) + padding
    assert edge.run(sent) == (XDP_TX, encapsulated(sent, flow, 3), {})


def test_padding_of_a_short_frame_is_no_part_of_the_packet(edge: Loaded) -> None:
    sent = bytes(frame(payload=b"")).ljust(60, b"\0")
    out = Ether(edge.run(sent).frame)
    assert out[IP].len == 20 + 40
    assert out[IP][1].len == 40
    assert edge.counter("vip_counters", 0) == (1, 40)


def test_it_is_redirected_if_the_real_is_behind_another_device(edge: Loaded) -> None:
    edge.put_real(3, hop=hop_to(3, ifindex=OTHER_DEVICE))
    sent = frame()
    assert edge.run(sent) == (XDP_REDIRECT, encapsulated(sent, TCP_FLOW, 3), {})


@pytest.mark.parametrize("bits", [12, 14, 16, 18])
def test_the_slot_is_the_top_of_the_flow_hash(balancer: Loaded, bits: int) -> None:
    balancer.put_vip(5, bits=bits)
    balancer.put_real(1)
    balancer.put_real(2)
    balancer.put_ring(word(1), 5, bits=bits, others={slot_of(TCP_FLOW, bits): word(2)})
    assert Ether(balancer.run(frame()).frame)[IP].dst == str(real_address(2))
    assert Ether(balancer.run(frame(UDP_FLOW)).frame)[IP].dst == str(real_address(1))


@pytest.mark.parametrize("flow", VECTORS, ids=str)
def test_the_program_and_python_hash_alike(edge: Loaded, flow: Flow) -> None:
    edge.put_vip(0, flow.dst, flow.dport)
    edge.put_ring(word(3, tracked=True))
    out = edge.run(frame(flow, "S")).frame
    record = edge.record(flow)
    assert record is not None
    assert record.hash == VECTORS[flow] >> 32
    assert int(IPv4Address(Ether(out)[IP].src)) & 0xFFFF == VECTORS[flow] & 0xFFFF


def test_packets_and_bytes_are_counted_for_vip_and_real(edge: Loaded) -> None:
    for payload in (b"", b"x" * 100):
        edge.run(frame(payload=payload))
    edge.run(frame(OTHER_PORT))
    assert edge.counter("vip_counters", 0) == edge.counter("real_counters", 3) == (2, 180)


# ---- not for a VIP ------------------------------------------------------------------------------

FOREIGN = {
    "arp": ETHER / ARP(pdst=str(VIP)),
    "ipv6": ETHER / IPv6() / TCP(dport=80),
    "vlan": ETHER / Dot1Q(vlan=7) / IP(dst=str(VIP)) / TCP(dport=80),
    "icmp to a VIP": ETHER / IP(dst=str(VIP)) / ICMP(),
    "ipip to a VIP": ETHER / IP(dst=str(VIP)) / IP(dst=str(VIP)) / TCP(dport=80),
    "other port": frame(OTHER_PORT),
    "other address": frame(TCP_FLOW._replace(dst=VIP + 1)),
    "fragment to another address": frame(TCP_FLOW._replace(dst=VIP + 1), flags="A", frag=9),
    "ip version 5": frame(version=5),
    "ip header of 16 bytes": frame(ihl=4),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_foreign_passes_untouched(edge: Loaded, kind: str) -> None:
    assert passed(edge.run(FOREIGN[kind]), FOREIGN[kind])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=14, max_size=200), st.booleans())
def test_noise_passes_untouched(edge: Loaded, noise: bytes, looks_like_ip: bool) -> None:
    sent = noise[:12] + (b"\x08\x00\x45" if looks_like_ip else noise[12:15]) + noise[15:]
    assert passed(edge.run(sent), sent)


# ---- what is dropped ----------------------------------------------------------------------------

FRAGMENTS: dict[str, dict[str, Any]] = {
    "first": {"flags": "MF"},
    "middle": {"flags": "MF", "frag": 100},
    "last": {"frag": 200},
}


@pytest.mark.parametrize("which", FRAGMENTS)
@pytest.mark.parametrize("flow", [TCP_FLOW, UDP_FLOW, OTHER_PORT], ids=["tcp", "udp", "other port"])
def test_fragments_to_a_vips_address_are_dropped(edge: Loaded, which: str, flow: Flow) -> None:
    sent = frame(flow)
    sent[IP].flags, sent[IP].frag = FRAGMENTS[which].get("flags", 0), FRAGMENTS[which].get("frag", 0)
    outcome = edge.run(sent)
    assert (outcome.verdict, outcome.drops) == (XDP_DROP, {"fragment": 1})


def test_df_alone_is_no_fragment(edge: Loaded) -> None:
    sent = frame()
    sent[IP].flags = "DF"
    assert edge.run(sent).verdict == XDP_TX


@pytest.mark.parametrize("flow", [TCP_FLOW, UDP_FLOW], ids=["tcp", "udp"])
@pytest.mark.parametrize("options", [[], OPTIONS], ids=["plain", "with options"])
def test_a_truncated_packet_passes_or_is_dropped_as_malformed(
    edge: Loaded, flow: Flow, options: list[Any]
) -> None:
    whole = bytes(frame(flow, options=options, payload=b"x" * 10))
    for length in range(14, len(whole)):
        sent = whole[:length]
        outcome = edge.run(sent)
        if length < 14 + 20:
            assert passed(outcome, sent), length
        else:
            assert outcome == (XDP_DROP, sent, {"malformed": 1}), length
    assert edge.run(whole).verdict == XDP_TX


@pytest.mark.parametrize("length", [0, 19, 20, 39, 42, 65535])
def test_a_length_that_does_not_fit_frame_and_headers_is_malformed(edge: Loaded, length: int) -> None:
    outcome = edge.run(frame(len=length))
    assert (outcome.verdict, outcome.drops) == (XDP_DROP, {"malformed": 1})


def test_without_a_ring_it_is_dropped(edge: Loaded) -> None:
    edge.put_vip(1)
    assert edge.run(frame()).drops == {"no_ring": 1}
    edge.put_vip(0, bits=14)
    assert edge.run(frame()).drops == {"no_ring": 1}


def test_without_a_backend_it_is_dropped(edge: Loaded) -> None:
    edge.put_ring(word(0))
    assert edge.run(frame()).drops == {"no_backend": 1}
    edge.put_ring(word(0, tracked=True))
    assert edge.run(frame()).drops == {"no_backend": 1}
    assert edge.records() == 0


def test_without_a_hop_it_is_dropped(edge: Loaded) -> None:
    edge.put_real(3, hop=hop_to(3, ifindex=0))
    assert edge.run(frame()).drops == {"no_hop": 1}
    assert edge.counter("vip_counters", 0) == (0, 0)


# ---- too big ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["plain", "with options"])
def test_a_packet_too_big_for_the_path_is_answered(edge: Loaded, options: list[Any]) -> None:
    edge.put_real(3, hop=hop_to(3, mtu=600))
    fits = frame(payload=b"x" * (600 - 20 - len(frame(options=options)[IP]) + 1), options=options)
    assert len(fits[IP]) == 580
    assert edge.run(fits).verdict == XDP_TX

    sent = frame(payload=bytes(fits[Raw]) + b"y", options=options)
    outcome = edge.run(sent)
    assert (outcome.verdict, outcome.drops) == (XDP_TX, {"too_big": 1})
    quote = bytes(sent)[14 : 14 + 68]
    expected = (
        Ether(dst=ETHER.src, src=ETHER.dst)
        / IP(src=str(VIP), dst=str(CLIENT), tos=0xC0, id=0, ttl=64, flags=0)
        / ICMP(type=3, code=4, nexthopmtu=580)
        / Raw(quote)
    )
    assert outcome.frame == bytes(expected)


def test_padding_does_not_make_a_packet_too_big(edge: Loaded) -> None:
    edge.put_real(3, hop=hop_to(3, mtu=100))
    assert edge.run(bytes(frame()) + bytes(200)).verdict == XDP_TX


def test_what_is_too_short_to_be_quoted_is_only_dropped(edge: Loaded) -> None:
    edge.put_real(3, hop=hop_to(3, mtu=60))
    outcome = edge.run(frame())
    assert (outcome.verdict, outcome.drops) == (XDP_DROP, {"too_big": 1})


def test_the_hop_in_use_is_the_one_that_counts(edge: Loaded) -> None:
    edge.put_spare_hop(3, hop_to(9))
    assert edge.run(frame()).frame[:12] == hop_to(3).dmac + hop_to(3).smac
    edge.turn_to_spare_hop(3)
    assert edge.run(frame()).frame[:12] == hop_to(9).dmac + hop_to(9).smac
