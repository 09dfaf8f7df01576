"""The flow hash mixes well enough that nearby connections spread over a ring, whatever differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.core.flowhash import flow_hash, slot
from tests.vectors import VECTORS, Flow

CLIENT, VIP = IPv4Address("198.51.100.7"), IPv4Address("203.0.113.1")
BITS = 12
FLOWS = 1 << 16  # 16 for each slot

SPREADS: dict[str, Iterable[Flow]] = {
    "source ports": (Flow(CLIENT, VIP, n, 80, 6) for n in range(FLOWS)),
    "even source ports": (Flow(CLIENT + n % 2, VIP, n & 0xFFFE, 80, 6) for n in range(FLOWS)),
    "clients": (Flow(CLIENT + n, VIP, 40000, 80, 6) for n in range(FLOWS)),
    "client networks": (Flow(IPv4Address(n << 16), VIP, 40000, 80, 6) for n in range(FLOWS)),
    "clients and ports": (Flow(CLIENT + n // 256, VIP, 1024 + n % 256, 80, 6) for n in range(FLOWS)),
    "VIPs": (Flow(CLIENT, VIP + n, 40000, 80, 17) for n in range(FLOWS)),
    "destination ports": (Flow(CLIENT, VIP, 40000, n, 17) for n in range(FLOWS)),
}


@pytest.mark.parametrize("flow", VECTORS, ids=str)
def test_vectors(flow: Flow) -> None:
    assert flow_hash(VECTORS.seed, *flow) == VECTORS[flow]


@pytest.mark.parametrize("differs", SPREADS)
def test_flows_that_differ_little_spread_over_the_ring(differs: str) -> None:
    counts = Counter(slot(flow_hash(VECTORS.seed, *flow), BITS) for flow in SPREADS[differs])
    mean = FLOWS / (1 << BITS)
    chi_square = sum((counts[n] - mean) ** 2 / mean for n in range(1 << BITS))
    freedom = (1 << BITS) - 1
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5  # six standard deviations of chance


@given(st.integers(0, 2**64 - 1), st.integers(0, 103))
def test_each_bit_of_a_flow_changes_the_top_half(seed: int, bit: int) -> None:
    """Bits of source and destination address, both ports and the protocol."""

    def hashed(bits: int) -> int:
        fields = [bits >> 72, bits >> 40, bits >> 24, bits >> 8, bits]
        src, dst, sport, dport, proto = (
            field & (1 << size) - 1 for field, size in zip(fields, (32, 32, 16, 16, 8), strict=True)
        )
        return flow_hash(seed, IPv4Address(src), IPv4Address(dst), sport, dport, proto)

    flow = int.from_bytes(bytes(range(13)))
    assert hashed(flow) >> 32 != hashed(flow ^ 1 << bit) >> 32


@given(st.integers(0, 2**64 - 1), st.sampled_from([12, 14, 16]))
def test_slots_nest(hash64: int, bits: int) -> None:
    assert slot(hash64, bits + 2) // 4 == slot(hash64, bits)
