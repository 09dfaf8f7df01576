"""The values the agent is made of: what is wanted, what the kernel holds, and the steps between.

Want: `Snapshot` of `Vip`s, each with its `Backend`s. Live: `Live`, read from the kernel's maps. Steps:
`Step`, the only way in which live changes. All are immutable; IP addresses are `ipaddress` objects,
numbers are host order. The kernel's side of each is declared in bpf/abi.h.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from ipaddress import IPv4Address
from typing import NamedTuple

RING_BITS = (12, 14, 16, 18)  # a ring has 2^bits slots; sizes nest, see core/slots.py
NOBODY = 0  # the real number that is nobody's


class Proto(enum.IntEnum):
    TCP = 6
    UDP = 17


class VipKey(NamedTuple):
    """What a packet is matched by."""

    address: IPv4Address
    port: int
    proto: Proto

    def __str__(self) -> str:
        return f"{self.address}:{self.port}/{self.proto.name.lower()}"


class Hop(NamedTuple):
    """The way to a real: Ethernet addresses (6 bytes each), output device, MTU of the path in bytes."""

    dmac: bytes
    smac: bytes
    ifindex: int
    mtu: int


# ---- want ---------------------------------------------------------------------------------------


class Duty(enum.Enum):
    """What a backend owes to connections: old and new, only old, or none."""

    ACTIVE = "active"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Backend:
    """A real in the setting of one VIP. Only an ACTIVE one with weight and a hop gets ring slots."""

    address: IPv4Address
    port: int
    weight: int
    duty: Duty
    hop: Hop | None

    @property
    def share(self) -> int:
        """The weight it has in the ring now."""
        return self.weight if self.duty is Duty.ACTIVE and self.hop is not None else 0


@dataclass(frozen=True, slots=True)
class Vip:
    """One service's load balancer. `backends` are sorted by address, each address once.

    held: its ring stays as it is, whatever the backends; only their next hops are kept current.
    """

    service: str
    keys: tuple[VipKey, ...]
    backends: tuple[Backend, ...]
    ring_bits: int
    settle_s: int = 300
    flags: int = 0
    held: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is wanted. No two VIPs share a key; services are unique."""

    vips: tuple[Vip, ...] = ()


UDP_STATELESS = 1  # of Vip.flags, as VIP_UDP_STATELESS of abi.h
UNNAMED = "?"  # "?<claimant, 16 hex digits>" names a service that only the kernel still knows


def claimant(service: str) -> int:
    """64 bits that stand for a service's name in the kernel; never 0."""
    if service.startswith(UNNAMED):
        return int(service.removeprefix(UNNAMED), 16)
    return int.from_bytes(blake2b(service.encode(), digest_size=8).digest(), "little") or 1


# ---- live ---------------------------------------------------------------------------------------


class RealState(enum.IntEnum):
    """As `enum real_state` of abi.h."""

    FREE = 0
    SERVING = 1
    DEAD = 2


@dataclass(frozen=True, slots=True)
class Real:
    """What a real number stands for. `vip` is the VIP's number. A FREE one keeps its generation."""

    address: IPv4Address
    vip: int
    generation: int
    state: RealState
    hop: Hop | None


@dataclass(frozen=True, slots=True)
class LiveVip:
    number: int
    ring_bits: int
    flags: int
    claimant: int


class RingId(NamedTuple):
    """Names a place in the outer map: rings of one VIP that differ in size have different places."""

    vip: int
    bits: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the kernel's maps hold. Real number 0 is nobody, so `reals` - 1 can be used."""

    vips: int
    reals: int
    flows: int


@dataclass(frozen=True, slots=True)
class Live:
    """What the kernel holds.

    rings: slots of 64 bits, as in abi.h, little-endian on all machines we support, 8 * 2^bits bytes.
    reals: every number ever used; the FREE ones too, for their generation.
    records: live flow records by real number, as the latest sweep saw them; None when a ring changed
        since: then nothing may be concluded from their absence.
    """

    capacity: Capacity
    vips: Mapping[VipKey, LiveVip] = field(default_factory=dict)
    rings: Mapping[RingId, bytes] = field(default_factory=dict)
    reals: Mapping[int, Real] = field(default_factory=dict)
    records: Mapping[int, int] | None = None


# ---- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteReals:
    """Fill free numbers, or change hop or state of used ones in place."""

    reals: Mapping[int, Real]


@dataclass(frozen=True, slots=True)
class SwapRings:
    """Stage fresh rings, then put all into the outer map by one batch update: the commit point."""

    rings: Mapping[RingId, bytes]


@dataclass(frozen=True, slots=True)
class Announce:
    """Let packets find these VIPs, or find them with another size of ring."""

    vips: Mapping[VipKey, LiveVip]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Packets to these keys pass untouched from now on."""

    keys: tuple[VipKey, ...]


@dataclass(frozen=True, slots=True)
class DropRings:
    """Take rings out of the outer map that no VIP names any more."""

    rings: tuple[RingId, ...]


@dataclass(frozen=True, slots=True)
class ClearReals:
    """Free numbers that no ring and no flow record names."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SettleSlots:
    """End the tracking of these slots, in place: elder becomes owner."""

    ring: RingId
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ForgetFlows:
    """Delete these flow records. keys: raw `struct flow_key`s."""

    keys: tuple[bytes, ...]


Step = WriteReals | SwapRings | Announce | Withdraw | DropRings | ClearReals | SettleSlots | ForgetFlows
