"""Hypothesis strategies for what operators may want, and a view of a live data plane by addresses."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

from hypothesis import strategies as st

from lbagent.core.model import Backend, Capacity, Duty, Hop, Live, Proto, RingId, Snapshot, Vip, VipKey

CAPACITY = Capacity(vips=16, reals=64, flows=1024)
SEED = 0x5EED
HOPS = [Hop(bytes([2, 0, 0, 0, 0, n]), b"\x02\0\0\0\0\xfe", 2 + n % 2, 1500) for n in range(4)]


def backend(n: int, weight: int = 1, duty: Duty = Duty.ACTIVE, hop: Hop | None = HOPS[0]) -> Backend:
    return Backend(IPv4Address(f"10.77.0.{n}"), 80, weight, duty, hop)


def vip(service: str, *backends: Backend, ring_bits: int = 12, n: int = 1, protos: str = "tcp") -> Vip:
    kinds = [Proto.TCP, Proto.UDP] if protos == "both" else [Proto[protos.upper()]]
    keys = tuple(VipKey(IPv4Address(f"203.0.113.{n}"), 80, proto) for proto in kinds)
    return Vip(service, keys, tuple(sorted(backends, key=lambda b: b.address)), ring_bits)


@st.composite
def backends(draw: st.DrawFn) -> tuple[Backend, ...]:
    hosts = draw(st.sets(st.integers(1, 6), max_size=6))
    return tuple(
        backend(n, draw(st.integers(0, 3)), draw(st.sampled_from(Duty)), draw(st.sampled_from([*HOPS, None])))
        for n in sorted(hosts)
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Up to three services with VIPs of their own; each may move to another address or ring size."""
    services = sorted(draw(st.sets(st.sampled_from(["api", "dns", "web"]))))
    addresses = draw(st.permutations([1, 2, 3]))
    return Snapshot(
        tuple(
            vip(
                name,
                *draw(backends()),
                ring_bits=draw(st.sampled_from([12, 12, 14])),
                n=n,
                protos=draw(st.sampled_from(["tcp", "udp", "both"])),
            )
            for name, n in zip(services, addresses, strict=False)
        )
    )


View = dict[VipKey, list[tuple[IPv4Address | None, IPv4Address | None, bool]]]


def view(live: Live) -> View:
    """What packets can tell: per VIP, each slot's owner and elder by address, and whether it is tracked."""
    names = {n: real.address for n, real in live.reals.items()}
    seen: View = {}
    for key, entry in live.vips.items():
        content = live.rings[RingId(entry.number, entry.ring_bits)]
        words = struct.unpack(f"<{len(content) // 8}Q", content)
        told = {w: (names.get(w & 0xFFFFF), names.get(w >> 20 & 0xFFFFF), bool(w >> 63)) for w in set(words)}
        seen[key] = [told[word] for word in words]
    return seen
