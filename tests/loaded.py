"""The real program, loaded in pins of its own: fill its tables, give it a packet, see what it makes of it."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

from lbagent.core import slots
from lbagent.core.flowhash import flow_hash, slot
from lbagent.core.model import Capacity, Hop, LiveVip, Proto, Real, RealState, VipKey
from lbagent.dataplane import abi, libbpf, program
from lbagent.dataplane.vipindex import VipIndex
from tests.vectors import VECTORS, Flow

CAPACITY = Capacity(vips=16, reals=64, flows=1024)
ENCAP_SOURCE = IPv4Network("10.254.0.0/16")
LOOPBACK = 1  # where test runs say that their packets come from
OTHER_DEVICE = 77
HOP_NOW = abi.offsetof("struct real", "hop_now")
VIP = IPv4Address("203.0.113.1")

_numbers = itertools.count()


@contextmanager
def private_pins() -> Iterator[Path]:
    """A place in bpffs for one test; nothing is left of it."""
    root = Path(f"/sys/fs/bpf/lbagent-test-{os.getpid()}-{next(_numbers)}")
    try:
        yield root
    finally:
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if root.exists():
            root.rmdir()


class Outcome(NamedTuple):
    """drops: the reasons that were counted, each with how often."""

    verdict: int
    frame: bytes
    drops: dict[str, int]


class Record(NamedTuple):
    """A flow record but for its time; hash: its top 32 bits."""

    real: int
    vip: int
    generation: int
    ending: bool = False
    hash: int = 0


@dataclass
class Loaded:
    """One build of the balancer. Tables are cleared by `clear`, not by loading anew: that takes a second."""

    build: program.Settings
    pinned: program.Pinned
    fd: int
    maps: Mapping[str, int]

    def __post_init__(self) -> None:
        self.index = VipIndex(self.maps["vip_index"])
        self._vips: dict[VipKey, LiveVip] = {}

    def clear(self) -> None:
        self.index.close()
        self.index = VipIndex(self.maps["vip_index"])  # which trusts nothing that it finds
        self.index.learn([])
        self._vips.clear()
        for name in ("vips", "flows"):
            libbpf.map_delete_keys(self.maps[name], list(libbpf.map_keys(self.maps[name])))
        libbpf.map_delete_keys(self.maps["rings"], [u32(n) for n in libbpf.array_u32(self.maps["rings"])])
        for number in range(CAPACITY.reals):
            libbpf.map_update(self.maps["reals"], u32(number), bytes(abi.sizeof("struct real")))
            libbpf.percpu_zero(self.maps["real_counters"], number)
        for number in range(CAPACITY.vips):
            libbpf.percpu_zero(self.maps["vip_counters"], number)

    # ---- tables ---------------------------------------------------------------------------------

    def put_vip(
        self, number: int = 0, address: IPv4Address = VIP, port: int = 80, *, bits: int = 12, flags: int = 0
    ) -> None:
        """For TCP and UDP, and the entry for the whole address."""
        vips = {VipKey(address, port, proto): LiveVip(number, bits, flags, 1) for proto in Proto}
        self.index.forget(vips)
        for key, vip in vips.items():
            libbpf.map_update(self.maps["vips"], abi.pack_vip_key(key), abi.pack_vip(vip))
        self._vips.update(vips)
        self.index.learn(self._vips.items())
        whole = abi.pack_vip(LiveVip(abi.VIP_ANY_NUMBER, 0, 0, 0))
        libbpf.map_update(self.maps["vips"], abi.pack_vip_any(address), whole)

    def put_ring(
        self, word: int, number: int = 0, *, bits: int = 12, others: Mapping[int, int] | None = None
    ) -> None:
        """All slots hold `word`, but for those given."""
        index = number * abi.RING_SIZES + (bits - abi.RING_BITS_MIN) // abi.RING_BITS_STEP
        words = array("Q", [word]) * (1 << bits)
        for place, other in (others or {}).items():
            words[place] = other
        with libbpf.new_ring(abi.ring_bytes(bits)) as fd:
            with libbpf.map_mmap(fd, abi.ring_bytes(bits)) as content:
                content[:] = abi.pack_ring(words.tobytes())
            libbpf.map_update(self.maps["rings"], u32(index), u32(fd))

    def put_slot(self, place: int, word: int) -> None:
        """In place, in the ring of 2^12 slots of VIP 0."""
        with self._small_ring() as content:
            head, slot = 4 * place, abi.heads_bytes(12) + 8 * place
            content[slot : slot + 8] = word.to_bytes(8, "little")
            content[head : head + 4] = slots.heads(word.to_bytes(8, "little"))

    def ring(self) -> tuple[bytes, bytes]:
        """Heads and slots of the ring of 2^12 slots of VIP 0."""
        with self._small_ring() as content:
            return content[: abi.heads_bytes(12)], content[abi.heads_bytes(12) :]

    @contextmanager
    def _small_ring(self) -> Iterator[mmap]:
        with (
            libbpf.map_by_id(libbpf.array_u32(self.maps["rings"])[0]) as fd,
            libbpf.map_mmap(fd, abi.ring_bytes(12)) as content,
        ):
            yield content

    def put_real(
        self,
        number: int,
        *,
        hop: Hop | None = None,
        state: RealState = RealState.SERVING,
        generation: int = 1,
        vip: int = 0,
    ) -> None:
        real = Real(real_address(number), vip, generation, state, hop or hop_to(number))
        libbpf.map_update(self.maps["reals"], u32(number), abi.pack_real(real))

    def put_spare_hop(self, number: int, hop: Hop) -> None:
        raw = bytearray(self._real(number))
        spare = abi.offsetof("struct real", "hops") + abi.sizeof("struct hop") * (1 - raw[HOP_NOW])
        raw[spare : spare + abi.sizeof("struct hop")] = abi.pack_hop(hop)
        libbpf.map_update(self.maps["reals"], u32(number), bytes(raw))

    def turn_to_spare_hop(self, number: int) -> None:
        raw = bytearray(self._real(number))
        raw[HOP_NOW] ^= 1
        libbpf.map_update(self.maps["reals"], u32(number), bytes(raw))

    def _real(self, number: int) -> bytes:
        return libbpf.map_lookup(self.maps["reals"], u32(number), abi.sizeof("struct real")) or b""

    def put_record(self, flow: Flow, record: Record) -> None:
        libbpf.map_update(self.maps["flows"], flow_key(flow), pack_record(record))

    def record(self, flow: Flow) -> Record | None:
        raw = libbpf.map_lookup(self.maps["flows"], flow_key(flow), abi.sizeof("struct flow"))
        return None if raw is None else unpack_record(raw)

    def records(self) -> int:
        return len(libbpf.map_dump(self.maps["flows"])[0]) // abi.sizeof("struct flow_key")

    def counter(self, name: str, number: int) -> tuple[int, int]:
        return libbpf.percpu_counters(self.maps[name], [number])[number]

    # ---- packets --------------------------------------------------------------------------------

    def run(self, frame: Any) -> Outcome:
        before = self._drops()
        verdict, out = libbpf.prog_run(self.fd, bytes(frame))
        after = self._drops()
        return Outcome(
            verdict, out, {name: n - before[name] for name, n in after.items() if n != before[name]}
        )

    def _drops(self) -> dict[str, int]:
        return {name: sum(libbpf.percpu_u64(self.maps["drops"], n)) for n, name in abi.DROP_NAMES.items()}


@contextmanager
def loaded(capacity: Capacity = CAPACITY) -> Iterator[Loaded]:
    with private_pins() as root, ExitStack() as opened:
        build = program.Settings(capacity, VECTORS.seed, ENCAP_SOURCE, root)
        pinned = program.ensure(build)
        fd = opened.enter_context(pinned.opened())
        maps = {name: opened.enter_context(libbpf.opened(pinned.directory / name)) for name in abi.MAPS}
        yield Loaded(build, pinned, fd, maps)


def word(owner: int, elder: int | None = None, *, tracked: bool = False, changed_s: int = 5) -> int:
    """A slot, as abi.h says."""
    elder = owner if elder is None else elder
    return owner | elder << 20 | changed_s << 40 | tracked << 63


def real_address(number: int) -> IPv4Address:
    return IPv4Address("10.77.0.0") + number


def hop_to(number: int, ifindex: int = LOOPBACK, mtu: int = 1500) -> Hop:
    return Hop(bytes([2, 0, 0, 0, 1, number]), bytes([2, 0, 0, 0, 2, number]), ifindex, mtu)


def encap_source(flow: Flow) -> IPv4Address:
    return ENCAP_SOURCE.network_address + (flow_hash(VECTORS.seed, *flow) & int(ENCAP_SOURCE.hostmask))


def slot_of(flow: Flow, bits: int = 12) -> int:
    return slot(flow_hash(VECTORS.seed, *flow), bits)


def flow_key(flow: Flow) -> bytes:
    ports = flow.sport.to_bytes(2, "big") + flow.dport.to_bytes(2, "big")
    return abi.pack_address(flow.src) + abi.pack_address(flow.dst) + ports + bytes((flow.proto, 0, 0, 0))


def pack_record(record: Record) -> bytes:
    fields = {
        "real": record.real,
        "vip": record.vip,
        "generation": record.generation,
        "hash": record.hash,
        "flags": abi.FLOW_ENDING if record.ending else 0,
    }
    return bytes(abi.ffi.buffer(abi.ffi.new("struct flow *", fields)))


def unpack_record(raw: bytes) -> Record:
    flow: Any = abi.ffi.from_buffer("struct flow *", raw)
    return Record(flow.real, flow.vip, flow.generation, bool(flow.flags & abi.FLOW_ENDING), flow.hash)


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")
