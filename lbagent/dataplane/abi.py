"""The structs and numbers of bpf/abi.h in Python, read from that very file.

Owns the way between values of core.model and the bytes in the kernel's maps. IPv4 addresses are kept as
::ffff:a.b.c.d there; ports are big-endian.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Any, cast

from cffi import FFI

from lbagent.core import slots
from lbagent.core.model import Hop, LiveVip, Proto, Real, RealState, VipKey
from lbagent.dataplane import sources

_TYPES = """
typedef uint8_t __u8;
typedef uint16_t __u16;
typedef uint32_t __u32;
typedef uint64_t __u64;
typedef uint16_t __be16;
"""

ffi = FFI()
ffi.cdef(_TYPES + re.sub(r"^#pragma.*$", "", (sources.folder() / "abi.h").read_text(), flags=re.MULTILINE))
_lib: Any = ffi.dlopen(None)

CONSTANTS: dict[str, int] = {name: int(getattr(_lib, name)) for name in dir(_lib)}
VIP_ANY_NUMBER = CONSTANTS["VIP_ANY_NUMBER"]
INDEX_UNKNOWN = CONSTANTS["INDEX_UNKNOWN"]
INDEX_NOBODY = CONSTANTS["INDEX_NOBODY"]
INDEX_MULTIPLIER = CONSTANTS["INDEX_MULTIPLIER"]
VIP_UDP_STATELESS = CONSTANTS["VIP_UDP_STATELESS"]
RING_BITS_MIN = CONSTANTS["RING_BITS_MIN"]
RING_BITS_STEP = CONSTANTS["RING_BITS_STEP"]
RING_SIZES = CONSTANTS["RING_SIZES"]
REAL_FREE = CONSTANTS["REAL_FREE"]
FLOW_ENDING = CONSTANTS["FLOW_ENDING"]
DROP_REASONS = CONSTANTS["DROP_REASONS"]
# enum drop -> the metric's label
DROP_NAMES: dict[int, str] = {
    value: name.removeprefix("DROP_").lower()
    for name, value in sorted(CONSTANTS.items(), key=lambda item: item[1])
    if name.startswith("DROP_") and name != "DROP_REASONS"
}

MAPS = ("vips", "vip_index", "rings", "reals", "flows", "vip_counters", "real_counters", "drops")

_V4_MAPPED = bytes(10) + b"\xff\xff"


def sizeof(ctype: str) -> int:
    return ffi.sizeof(ctype)


def offsetof(ctype: str, field: str) -> int:
    return ffi.offsetof(ctype, field)


# ---- model -> bytes -----------------------------------------------------------------------------


def pack_address(address: IPv4Address) -> bytes:
    return _V4_MAPPED + address.packed


def pack_vip_key(key: VipKey) -> bytes:
    return _pack_key(key.address, key.port, key.proto)


def pack_vip_any(address: IPv4Address) -> bytes:
    """The key of the entry that marks an address as some VIP's. Its value's number is VIP_ANY_NUMBER."""
    return _pack_key(address, 0, 0)


def _pack_key(address: IPv4Address, port: int, proto: int) -> bytes:
    return pack_address(address) + port.to_bytes(2, "big") + bytes((proto, 0))


def pack_vip(vip: LiveVip) -> bytes:
    return _bytes(
        ffi.new(
            "struct vip *",
            {
                "number": vip.number,
                "ring_bits": vip.ring_bits,
                "flags": vip.flags,
                "claimant": vip.claimant,
            },
        )
    )


def pack_real(real: Real) -> bytes:
    """With its hop in both places, hops[0] in use. No hop is all zero: packets are dropped and counted."""
    hop = pack_hop(real.hop)
    packed: Any = ffi.new(
        "struct real *",
        {
            "address": {"bytes": pack_address(real.address)},
            "vip": real.vip,
            "generation": real.generation,
            "state": real.state,
        },
    )
    ffi.buffer(packed.hops)[:] = hop + hop
    return _bytes(packed)


def pack_hop(hop: Hop | None) -> bytes:
    if hop is None:
        return bytes(sizeof("struct hop"))
    return _bytes(
        ffi.new("struct hop *", {"dmac": hop.dmac, "smac": hop.smac, "ifindex": hop.ifindex, "mtu": hop.mtu})
    )


def _bytes(pointer: Any) -> bytes:
    return bytes(ffi.buffer(pointer))


def pack_ring(content: bytes) -> bytes:
    """The entries of a ring's array for these slots: their heads, then the slots."""
    return slots.heads(content) + content


def heads_bytes(bits: int) -> int:
    """Where the slots begin in the array of a ring of 2^bits."""
    return 4 << bits


def ring_bytes(bits: int) -> int:
    return (4 << bits) + (8 << bits)


# ---- bytes -> model -----------------------------------------------------------------------------


def unpack_address(raw: bytes) -> IPv4Address:
    mapped = IPv6Address(raw).ipv4_mapped
    if mapped is None:
        return IPv4Address(raw[12:])  # all zero in a number that was never used
    return mapped


def unpack_vip_key(raw: bytes) -> VipKey:
    """The entry for a whole address has port 0 and proto 0, which Proto lacks: go by its value's number."""
    proto = raw[18]
    named = Proto(proto) if proto else cast("Proto", 0)
    return VipKey(unpack_address(raw[:16]), int.from_bytes(raw[16:18], "big"), named)


def unpack_vip_keys(raw: bytes) -> list[VipKey]:
    size = sizeof("struct vip_key")
    return [unpack_vip_key(raw[at : at + size]) for at in range(0, len(raw), size)]


def unpack_vips(raw: bytes) -> list[LiveVip]:
    return [LiveVip(v.number, v.ring_bits, v.flags, v.claimant) for v in ffi.from_buffer("struct vip[]", raw)]


def unpack_real(raw: bytes) -> Real:
    """Of both hops the one in use."""
    real: Any = ffi.from_buffer("struct real *", raw)
    hop = real.hops[real.hop_now & 1]
    known = Hop(_bytes(hop.dmac), _bytes(hop.smac), hop.ifindex, hop.mtu) if hop.ifindex else None
    return Real(
        unpack_address(_bytes(real.address.bytes)), real.vip, real.generation, RealState(real.state), known
    )
