"""On a backend: the outer header comes off packets for addresses that were told, and off nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from lbagent.dataplane import abi, libbpf, program
from lbagent.dataplane.libbpf import XDP_PASS
from tests.kernel.frames import ETHER, OPTIONS
from tests.loaded import VIP, private_pins


class Decap(NamedTuple):
    fd: int
    addresses: int

    def run(self, frame: Any) -> bytes:
        """The frame as the host sees it."""
        verdict, out = libbpf.prog_run(self.fd, bytes(frame))
        assert verdict == XDP_PASS
        return out

    def counted(self) -> tuple[int, int]:
        size = libbpf.value_bytes(libbpf.map_info(self.addresses))
        raw = libbpf.map_lookup(self.addresses, abi.pack_address(VIP), size)
        words = list(memoryview(raw or b"").cast("Q"))
        return sum(words[::2]), sum(words[1::2])


@pytest.fixture(scope="module")
def decap() -> Iterator[Decap]:
    with private_pins() as root:
        pinned = program.ensure(program.DecapSettings(16, root))
        with pinned.opened() as fd, libbpf.opened(pinned.directory / "addresses") as addresses:
            size = libbpf.value_bytes(libbpf.map_info(addresses))
            libbpf.map_update(addresses, abi.pack_address(VIP), bytes(size))
            yield Decap(fd, addresses)


def inner(payload: bytes = b"x", dst: IPv4Address = VIP, **ip: Any) -> Any:
    return IP(src="198.51.100.7", dst=str(dst), **ip) / TCP(sport=40000, dport=80) / Raw(payload)


def outer(**ip: Any) -> Any:
    return ETHER / IP(src="10.254.0.9", dst="10.77.0.3", proto=4, **ip)


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["plain", "with options"])
def test_the_outer_header_comes_off(decap: Decap, options: list[Any]) -> None:
    before = decap.counted()
    packet = inner()
    assert decap.run(outer(options=options) / packet) == bytes(ETHER / packet)
    assert decap.counted() == (before[0] + 1, before[1] + len(packet))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=1000), st.integers(0, 40), st.integers(0, 40), st.binary(max_size=40))
def test_any_sound_packet_comes_out_whole(
    decap: Decap, payload: bytes, outer_nops: int, inner_nops: int, padding: bytes
) -> None:
    packet = bytes(inner(payload, options=[IPOption_NOP()] * inner_nops))
    sent = bytes(outer(options=[IPOption_NOP()] * outer_nops) / Raw(packet)) + padding
    assert decap.run(sent) == bytes(ETHER)[:12] + b"\x08\x00" + packet + padding


def test_an_inner_fragment_comes_out_as_one(decap: Decap) -> None:
    packet = inner(flags="MF")
    assert decap.run(outer() / packet) == bytes(ETHER / packet)


FOREIGN = {
    "another address": outer() / inner(dst=VIP + 1),
    "no tunnel": ETHER / inner(),
    "udp": ETHER / IP(dst=str(VIP)) / UDP(dport=80),
    "ipv6 in ip": outer() / IPv6() / TCP(),
    "outer fragment": outer(flags="MF") / inner(),
    "inner version 6": outer() / inner(version=6),
    "inner header of 16 bytes": outer() / inner(ihl=4),
    "inner length beyond the outer": outer(len=20 + 41) / inner(len=42) / Raw(b"padding"),
    "inner length beyond the frame": outer(len=2000) / inner(len=1900),
    "inner length within the header": outer() / inner(len=19),
    "gre": ETHER / IP(dst="10.77.0.3", proto=47) / Raw(b"\0\0\x08\0") / inner(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_everything_else_passes_untouched(decap: Decap, kind: str) -> None:
    assert decap.run(FOREIGN[kind]) == bytes(FOREIGN[kind])


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["plain", "with options"])
def test_a_truncated_packet_passes_untouched(decap: Decap, options: list[Any]) -> None:
    whole = bytes(outer(options=options) / inner())
    for length in range(14, len(whole)):
        assert decap.run(whole[:length]) == whole[:length], length
