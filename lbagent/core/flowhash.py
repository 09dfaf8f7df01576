"""The flow hash of bpf/hash.h in Python: which slot a connection has. tests/unit has the shared vectors."""

from __future__ import annotations

from ipaddress import IPv4Address

_ALL = (1 << 64) - 1


def flow_hash(seed: int, src: IPv4Address, dst: IPv4Address, sport: int, dport: int, proto: int) -> int:
    """64 bits; the top ones are the best mixed. Words are read little-endian as they lie in the packet."""
    x = seed ^ int.from_bytes(src.packed + dst.packed, "little")
    x = x * 0x9E3779B97F4A7C15 & _ALL
    x ^= x >> 32
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    x ^= proto << 32 | int.from_bytes(ports, "little")
    x = x * 0xBF58476D1CE4E5B9 & _ALL
    x ^= x >> 32
    return x * 0x94D049BB133111EB & _ALL


def slot(hash64: int, ring_bits: int) -> int:
    """Its place in a ring of 2^ring_bits slots."""
    return hash64 >> (64 - ring_bits)
