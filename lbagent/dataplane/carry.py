"""What a new build's maps take over from an older build's.

A map of the same shape is shared: the old one is pinned in the new one's place. Otherwise entries are copied;
keys and values that have grown get zeros at their end, which bpf/abi.h promises to be right.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

from lbagent.dataplane import abi, libbpf
from lbagent.dataplane.libbpf import MapInfo
from lbagent.errors import DataplaneError

FRESH = ("vip_index",)  # its places mean what the build that made it means; an empty one is never wrong
PERCPU = (libbpf.MAP_PERCPU_ARRAY, libbpf.MAP_PERCPU_HASH)
HASHES = (libbpf.MAP_HASH, libbpf.MAP_LRU_HASH, libbpf.MAP_PERCPU_HASH)


def take_over(old: Path, new: Path) -> None:
    """`new` holds only maps, nobody uses them yet. Raises DataplaneError when what is in use does not fit."""
    for pin in sorted(new.iterdir()):
        if pin.name in FRESH or not (old / pin.name).exists():
            continue
        with libbpf.opened(old / pin.name) as source, libbpf.opened(pin) as target:
            if libbpf.map_info(source).shape == libbpf.map_info(target).shape:
                pin.unlink()
                libbpf.obj_pin(source, pin)
            else:
                _copy(source, target, libbpf.ANY)


def late_flows(old: Path, new: Path) -> None:
    """Flow records that the old program wrote after they were copied. Those that the new one knows stay."""
    if (old / "flows").exists() and (new / "flows").exists():
        with libbpf.opened(old / "flows") as source, libbpf.opened(new / "flows") as target:
            if libbpf.map_info(source).id != libbpf.map_info(target).id:
                _copy(source, target, libbpf.NOEXIST)


def _copy(source: int, target: int, flags: int) -> None:
    old, new = libbpf.map_info(source), libbpf.map_info(target)
    if old.type != new.type:
        raise DataplaneError(f"{new.name}: type {old.type} cannot become {new.type}")
    with _content(source, old) as (keys, values):
        if old.type not in HASHES:
            keys, values = _fitting(keys, values, new)
        elif len(keys) > new.max_entries and old.type != libbpf.MAP_LRU_HASH:
            raise DataplaneError(
                f"{new.name}: {len(keys)} entries are in use, only {new.max_entries} would fit"
            )
        keys = [key.ljust(new.key_size, b"\0") for key in keys]
        values = [_grown(value, old, new) for value in values]
        if flags == libbpf.NOEXIST:
            _insert_missing(target, keys, values)
        else:
            libbpf.map_update_batch(target, b"".join(keys), b"".join(values), len(keys), flags)


@contextlib.contextmanager
def _content(fd: int, info: MapInfo) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Keys and values; of an array of maps the inner maps' descriptors, which are closed after the block."""
    with contextlib.ExitStack() as opened:
        if info.type == libbpf.MAP_ARRAY_OF_MAPS:
            inner = {i: opened.enter_context(libbpf.map_by_id(n)) for i, n in libbpf.array_u32(fd).items()}
            yield [_u32(index) for index in inner], [_u32(number) for number in inner.values()]
        else:
            keys, values = libbpf.map_dump(fd)
            yield _pieces(keys, info.key_size), _pieces(values, libbpf.value_bytes(info))


def _fitting(keys: list[bytes], values: list[bytes], new: MapInfo) -> tuple[list[bytes], list[bytes]]:
    """The part of an array that the new one has room for; the rest must be empty, but for counts."""
    room = [int.from_bytes(key, sys.byteorder) < new.max_entries for key in keys]
    for key, value, fits in zip(keys, values, room, strict=True):
        if not fits and any(value) and new.type not in PERCPU and not _is_free(new, value):
            number = int.from_bytes(key, sys.byteorder)
            raise DataplaneError(f"{new.name}: entry {number} is in use, only {new.max_entries} would fit")
    return (
        [key for key, fits in zip(keys, room, strict=True) if fits],
        [value for value, fits in zip(values, room, strict=True) if fits],
    )


def _is_free(info: MapInfo, value: bytes) -> bool:
    """A real's number that was used once keeps its generation; with the number gone, that is of no use."""
    return info.name == "reals" and value[abi.offsetof("struct real", "state")] == abi.REAL_FREE


def _grown(value: bytes, old: MapInfo, new: MapInfo) -> bytes:
    if old.value_size > new.value_size:
        raise DataplaneError(
            f"{new.name}: values of {old.value_size} bytes cannot shrink to {new.value_size}"
        )
    if old.type not in PERCPU:
        return value.ljust(new.value_size, b"\0")
    stride = libbpf.value_bytes(new) // libbpf.cpus()
    return b"".join(part.ljust(stride, b"\0") for part in _pieces(value, len(value) // libbpf.cpus()))


def _insert_missing(fd: int, keys: list[bytes], values: list[bytes]) -> None:
    """One by one: a batch ends at the first key that is there."""
    for key, value in zip(keys, values, strict=True):
        try:
            libbpf.map_update(fd, key, value, libbpf.NOEXIST)
        except DataplaneError as error:
            if error.errno != errno.EEXIST:
                raise


def _pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)
