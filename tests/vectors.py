"""Hashes of some flows, known beforehand: Python and the program must both find them."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import NamedTuple


class Flow(NamedTuple):
    src: IPv4Address
    dst: IPv4Address
    sport: int
    dport: int
    proto: int

    def __str__(self) -> str:
        return f"{self.src}:{self.sport}-{self.dst}:{self.dport}/{self.proto}"


class Vectors(dict[Flow, int]):
    seed = 0x0123456789ABCDEF


def _flow(src: str, dst: str, sport: int, dport: int, proto: int) -> Flow:
    return Flow(IPv4Address(src), IPv4Address(dst), sport, dport, proto)


VECTORS = Vectors(
    {
        _flow("198.51.100.7", "203.0.113.1", 40000, 80, 6): 0xC11D26847A0E64AC,
        _flow("198.51.100.7", "203.0.113.1", 40001, 80, 6): 0x76E5B55DEB4662C9,
        _flow("198.51.100.7", "203.0.113.1", 40000, 80, 17): 0x18A92120D8A14073,
        _flow("198.51.100.8", "203.0.113.1", 40000, 80, 6): 0x0029998AC066A577,
        _flow("0.0.0.0", "0.0.0.0", 0, 0, 6): 0x8533F83F85125946,
        _flow("255.255.255.255", "255.255.255.255", 65535, 65535, 17): 0xA36C8BCFD58DFA1D,
        _flow("10.0.0.1", "10.0.0.2", 1, 65535, 6): 0xFFDFE5AE83262861,
    }
)
