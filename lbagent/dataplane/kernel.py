"""The data plane in the kernel: the pinned maps of the XDP program, behind the protocol.

All state is in the maps; this object only holds descriptors and may be thrown away at any time. Rings and
reals are written through mmap, where a word is written whole or not at all. What was written is read back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, assert_never

from lbagent.core import slots
from lbagent.core.model import (
    Announce,
    Capacity,
    ClearReals,
    DropRings,
    ForgetFlows,
    Live,
    LiveVip,
    Real,
    RealState,
    RingId,
    SettleSlots,
    Step,
    SwapRings,
    VipKey,
    Withdraw,
    WriteReals,
)
from lbagent.dataplane import Counters, Records, abi, libbpf, refuse_overflow
from lbagent.dataplane.vipindex import VipIndex
from lbagent.errors import DataplaneError

REAL_SIZE = abi.sizeof("struct real")
HOP_SIZE = abi.sizeof("struct hop")
VIP_AT = abi.offsetof("struct real", "vip")
STATE_AT = abi.offsetof("struct real", "state")
HOP_NOW_AT = abi.offsetof("struct real", "hop_now")
HOPS_AT = abi.offsetof("struct real", "hops")
ANY_VIP = LiveVip(abi.VIP_ANY_NUMBER, 0, 0, 0)


class Kernel:
    """The maps pinned in `directory` by lbagent.dataplane.compile. Not for use by two threads at once."""

    def __init__(self, directory: Path) -> None:
        self._maps = {name: libbpf.obj_get(directory / name) for name in abi.MAPS}
        info = {name: libbpf.map_info(fd) for name, fd in self._maps.items()}
        self.capacity = Capacity(
            vips=info["rings"].max_entries // abi.RING_SIZES,
            reals=info["reals"].max_entries,
            flows=info["flows"].max_entries,
        )
        self._reals = libbpf.map_mmap(self._maps["reals"], self.capacity.reals * REAL_SIZE)
        self._rehopped: set[int] = set()  # reals whose spare hop a packet may still be reading
        self._index = VipIndex(self._maps["vip_index"])
        self._tidy_addresses()
        self._index.learn(self._vips())

    def close(self) -> None:
        self._index.close()
        self._reals.close()
        for fd in self._maps.values():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def now_ns(self) -> int:
        return time.monotonic_ns()

    # ---- reading --------------------------------------------------------------------------------

    def read(self) -> Live:
        vips = {key: vip for key, vip in self._vips() if vip.number != abi.VIP_ANY_NUMBER}
        rings = {ring: self._slots(ring, map_id) for ring, map_id in self._ring_ids().items()}
        return Live(self.capacity, vips, rings, self._read_reals())

    def records(self) -> Records:
        keys, values = libbpf.map_dump(self._maps["flows"])
        return Records(keys, values, len(keys) // abi.sizeof("struct flow_key"))

    def counters(self) -> Counters:
        vips = sorted({vip.number for _, vip in self._vips() if vip.number != abi.VIP_ANY_NUMBER})
        reals = sorted(n for n, real in self._read_reals().items() if real.state is not RealState.FREE)
        drops = self._maps["drops"]
        return Counters(
            libbpf.percpu_counters(self._maps["vip_counters"], vips),
            libbpf.percpu_counters(self._maps["real_counters"], reals),
            {name: sum(libbpf.percpu_u64(drops, reason)) for reason, name in abi.DROP_NAMES.items()},
        )

    def _vips(self) -> list[tuple[VipKey, LiveVip]]:
        keys, values = libbpf.map_dump(self._maps["vips"])
        return list(zip(abi.unpack_vip_keys(keys), abi.unpack_vips(values), strict=True))

    def _read_reals(self) -> dict[int, Real]:
        """Every number that was ever used: of the others, the word with VIP, generation and state is zero."""
        with (
            memoryview(self._reals) as raw,
            raw.cast("Q") as words,
            words[VIP_AT // 8 :: REAL_SIZE // 8] as said,
        ):
            used = [number for number, word in enumerate(said.tolist()) if word and number]
        return {number: self._real(number) for number in used}

    def _ring_ids(self) -> dict[RingId, int]:
        """Ids of the inner maps by place."""
        ids = libbpf.array_u32(self._maps["rings"])
        return {_place(index): map_id for index, map_id in ids.items() if map_id}

    def _ring_id(self, ring: RingId) -> int | None:
        raw = libbpf.map_lookup(self._maps["rings"], _u32(_index(ring)), 4)
        return int.from_bytes(raw, sys.byteorder) if raw else None

    def _slots(self, ring: RingId, map_id: int) -> bytes:
        with self._mapped(ring, map_id) as content:
            return content[abi.heads_bytes(ring.bits) :]

    @contextlib.contextmanager
    def _mapped(self, ring: RingId, map_id: int) -> Iterator[mmap.mmap]:
        with libbpf.map_by_id(map_id) as fd, libbpf.map_mmap(fd, abi.ring_bytes(ring.bits)) as content:
            yield content

    # ---- writing --------------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        refuse_overflow(self.capacity, step)
        match step:
            case WriteReals(reals):
                for number, real in reals.items():
                    self._write_real(number, real)
            case SwapRings(rings):
                self._swap(rings)
            case Announce(vips):
                self._announce(vips)
            case Withdraw(keys):
                self._withdraw(keys)
            case DropRings(rings_):
                libbpf.map_delete_keys(self._maps["rings"], [_u32(_index(ring)) for ring in rings_])
            case ClearReals(numbers):
                for number in numbers:
                    self._clear_real(number)
            case SettleSlots(ring, numbers):
                self._settle(ring, numbers)
            case ForgetFlows(flow_keys):
                libbpf.map_delete_keys(self._maps["flows"], flow_keys)
            case _:
                assert_never(step)

    def _write_real(self, number: int, real: Real) -> None:
        """Fill a free number, or change hop and state of one that packets may be reading."""
        at = number * REAL_SIZE
        old = abi.unpack_real(bytes(self._reals[at : at + REAL_SIZE]))
        in_place = old.state is not RealState.FREE and old == replace(real, hop=old.hop, state=old.state)
        if not in_place:
            libbpf.percpu_zero(self._maps["real_counters"], number)
            self._reals[at : at + REAL_SIZE] = abi.pack_real(real)
        elif real.hop != old.hop:
            self._rehop(number, real)
        self._reals[at + STATE_AT] = real.state
        self._expect(self._real(number) == real, "reals", f"{number} is {self._real(number)}, not {real}")

    def _rehop(self, number: int, real: Real) -> None:
        """Write the spare hop, then turn to it. A packet may still read what was the hop before the latest
        turn, so a second turn waits for a grace period."""
        if number in self._rehopped:
            self._grace_period()
        self._rehopped.add(number)
        at = number * REAL_SIZE
        spare = 1 - (self._reals[at + HOP_NOW_AT] & 1)
        place = at + HOPS_AT + spare * HOP_SIZE
        self._reals[place : place + HOP_SIZE] = abi.pack_hop(real.hop)
        self._reals[at + HOP_NOW_AT] = spare

    def _grace_period(self) -> None:
        """Wait until no packet is read by what was there before: the kernel does so after it put a map into
        an outer map, also when it is the map that was there."""
        for ring, map_id in self._ring_ids().items():
            with libbpf.map_by_id(map_id) as fd:
                libbpf.map_update(self._maps["rings"], _u32(_index(ring)), _u32(fd))
            break
        self._rehopped.clear()

    def _real(self, number: int) -> Real:
        return abi.unpack_real(bytes(self._reals[number * REAL_SIZE : (number + 1) * REAL_SIZE]))

    def _clear_real(self, number: int) -> None:
        old = self._real(number)
        at = number * REAL_SIZE
        self._reals[at + STATE_AT] = RealState.FREE
        cleared = replace(old, state=RealState.FREE, hop=None)
        self._reals[at : at + REAL_SIZE] = abi.pack_real(cleared)
        self._expect(self._real(number) == cleared, "reals", f"real {number} was not cleared")

    def _swap(self, rings: Mapping[RingId, bytes]) -> None:
        with contextlib.ExitStack() as staged:
            fds = {}
            for ring, content in rings.items():
                size = abi.ring_bytes(ring.bits)
                fds[ring] = staged.enter_context(libbpf.new_ring(size))
                with libbpf.map_mmap(fds[ring], size) as entries:
                    entries[:] = abi.pack_ring(content)
            keys = b"".join(_u32(_index(ring)) for ring in fds)
            libbpf.map_update_batch(self._maps["rings"], keys, b"".join(map(_u32, fds.values())), len(fds))
            self._rehopped.clear()
            for ring, fd in fds.items():
                is_there = self._ring_id(ring) == libbpf.map_info(fd).id
                self._expect(is_there, "rings", f"{ring} was not swapped in")

    def _announce(self, vips: Mapping[VipKey, LiveVip]) -> None:
        known = {vip.number for _, vip in self._vips()}
        for number in {vip.number for vip in vips.values()} - known:
            libbpf.percpu_zero(self._maps["vip_counters"], number)
        self._index.forget(vips)
        for address in {key.address for key in vips}:
            libbpf.map_update(self._maps["vips"], abi.pack_vip_any(address), abi.pack_vip(ANY_VIP))
        for key, vip in vips.items():
            libbpf.map_update(self._maps["vips"], abi.pack_vip_key(key), abi.pack_vip(vip))
        found = dict(self._vips())
        self._index.learn(found.items())
        for key, vip in vips.items():
            self._expect(found.get(key) == vip, "vips", f"{key} is {found.get(key)}, not {vip}")

    def _withdraw(self, keys: Iterable[VipKey]) -> None:
        self._index.forget(keys)
        libbpf.map_delete_keys(self._maps["vips"], [abi.pack_vip_key(key) for key in keys])
        self._tidy_addresses()
        entries = self._vips()
        self._index.learn(entries)
        left = {key for key, _ in entries}
        self._expect(not left.intersection(keys), "vips", f"{list(keys)} were not all withdrawn")

    def _tidy_addresses(self) -> None:
        """Each address of a VIP has one entry that says so (abi.h, VIP_ANY_NUMBER); others have none."""
        entries = self._vips()
        marked = {key.address for key, vip in entries if vip.number == abi.VIP_ANY_NUMBER}
        wanted = {key.address for key, vip in entries if vip.number != abi.VIP_ANY_NUMBER}
        for address in wanted - marked:
            libbpf.map_update(self._maps["vips"], abi.pack_vip_any(address), abi.pack_vip(ANY_VIP))
        libbpf.map_delete_keys(self._maps["vips"], [abi.pack_vip_any(address) for address in marked - wanted])

    def _settle(self, ring: RingId, numbers: Iterable[int]) -> None:
        map_id = self._ring_id(ring)
        if map_id is None:
            raise DataplaneError(f"rings: {ring} is not there")
        begin = abi.heads_bytes(ring.bits)
        with self._mapped(ring, map_id) as content, memoryview(content) as raw:
            settled = slots.settle(bytes(raw[begin:]), numbers)
            words, owners = memoryview(settled).cast("Q"), memoryview(slots.heads(settled)).cast("I")
            with (
                raw[begin:] as there,
                there.cast("Q") as live,
                raw[:begin] as front,
                front.cast("I") as heads,
            ):
                for number in numbers:  # the slot first: a head that still says TRACKED only sends there
                    live[number] = words[number]
                    heads[number] = owners[number]

    def _expect(self, held: bool, table: str, what: str) -> None:
        if not held:
            raise DataplaneError(f"{table}: {what}")


def _index(ring: RingId) -> int:
    """Outer index of a ring's place, as abi.h says."""
    return ring.vip * abi.RING_SIZES + (ring.bits - abi.RING_BITS_MIN) // abi.RING_BITS_STEP


def _place(index: int) -> RingId:
    vip, size = divmod(index, abi.RING_SIZES)
    return RingId(vip, abi.RING_BITS_MIN + size * abi.RING_BITS_STEP)


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)
