"""The index of VIPs (bpf/abi.h): it spares packets the look-up in the hash, from which it is filled.

Around every change of the hash: `forget` the keys that change, change the hash, then `learn` all that it
holds. So what a place says is true at every moment, and one that says nothing sends packets to the hash.
"""

from __future__ import annotations

from collections.abc import Iterable

from lbagent.core.model import LiveVip, VipKey
from lbagent.dataplane import abi, libbpf

ENTRY = abi.sizeof("struct index_entry")
WORDS = ENTRY // 8


class VipIndex:
    """The map's content, in place. One writer."""

    def __init__(self, fd: int) -> None:
        size = libbpf.map_info(fd).max_entries
        self._bits = size.bit_length() - 1
        self._content = libbpf.map_mmap(fd, size * ENTRY)
        self._words = memoryview(self._content).cast("Q")
        self._taken = set(range(size))  # places that may say something else than INDEX_NOBODY

    def close(self) -> None:
        self._words.release()
        self._content.close()

    def forget(self, keys: Iterable[VipKey]) -> None:
        for key in keys:
            place = self._place(index_key(key))
            self._words[place * WORDS] = abi.INDEX_UNKNOWN
            self._taken.add(place)

    def learn(self, vips: Iterable[tuple[VipKey, LiveVip]]) -> None:
        """vips: all that the hash holds."""
        wanted: dict[int, list[tuple[int, LiveVip]]] = {}
        for vip_key, vip in vips:
            if vip.number != abi.VIP_ANY_NUMBER:
                key = index_key(vip_key)
                wanted.setdefault(self._place(key), []).append((key, vip))
        for place in self._taken - wanted.keys():
            self._words[place * WORDS] = abi.INDEX_NOBODY
        for place, entries in wanted.items():
            self._write(place, entries)
        self._taken = set(wanted)

    def _write(self, place: int, entries: list[tuple[int, LiveVip]]) -> None:
        key, vip = entries[0]
        word = int.from_bytes(abi.pack_vip(vip)[:8], "little")
        at = place * WORDS
        if len(entries) > 1:
            self._words[at] = abi.INDEX_UNKNOWN  # two cannot be told apart here
        elif (self._words[at], self._words[at + 1]) != (key, word):
            self._words[at] = abi.INDEX_UNKNOWN
            self._words[at + 1] = word
            self._words[at] = key

    def _place(self, key: int) -> int:
        return place(key, self._bits)


def index_key(key: VipKey) -> int:
    port = int.from_bytes(key.port.to_bytes(2, "big"), "little")
    return int.from_bytes(key.address.packed, "little") | port << 32 | key.proto << 48


def place(key: int, bits: int) -> int:
    return (key * abi.INDEX_MULTIPLIER & (1 << 64) - 1) >> (64 - bits)
