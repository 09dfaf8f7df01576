"""Frames to and from the balancer, made by scapy."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from tests.loaded import VIP, encap_source, hop_to, real_address
from tests.vectors import Flow

CLIENT = IPv4Address("198.51.100.7")
TCP_FLOW, UDP_FLOW = Flow(CLIENT, VIP, 40000, 80, 6), Flow(CLIENT, VIP, 40000, 80, 17)
ETHER = Ether(dst="02:00:00:00:00:fe", src="02:00:00:00:00:01")
OPTIONS = [IPOption_RR(length=23, pointer=4, routers=["0.0.0.0"] * 5), IPOption_NOP()]


def frame(flow: Flow = TCP_FLOW, flags: str = "A", payload: bytes = b"x", **ip: Any) -> Any:
    l4 = TCP(sport=flow.sport, dport=flow.dport, flags=flags)
    if flow.proto == 17:
        l4 = UDP(sport=flow.sport, dport=flow.dport)
    return ETHER / IP(src=str(flow.src), dst=str(flow.dst), **ip) / l4 / Raw(payload)


def encapsulated(inner: Any, flow: Flow, real: int) -> bytes:
    """What must leave, for real number `real`."""
    hop = hop_to(real)
    inner = bytes(inner)
    length = int.from_bytes(inner[16:18], "big")
    outer = IP(
        src=str(encap_source(flow)),
        dst=str(real_address(real)),
        tos=inner[15],
        id=0,
        flags="DF",
        ttl=64,
        proto=4,
        len=20 + length,
    )
    return hop.dmac + hop.smac + b"\x08\x00" + bytes(outer) + inner[14:]


def real_of(sent_on: bytes) -> int:
    """The number of the real that an encapsulated frame goes to."""
    return int(IPv4Address(Ether(sent_on)[IP].dst)) - int(real_address(0))
