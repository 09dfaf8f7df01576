"""What we need of libbpf.so.1: maps and programs by descriptor, raw bytes in and out.

Every failure is a DataplaneError with errno and the name of the map or path. Callers own the descriptors
they are given. libbpf is present wherever bcc is, as bcc's own library depends on it.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cffi import FFI

from lbagent.errors import DataplaneError

# enum bpf_map_type and map flags, linux/bpf.h
MAP_HASH, MAP_ARRAY, MAP_PERCPU_HASH, MAP_PERCPU_ARRAY, MAP_LRU_HASH, MAP_ARRAY_OF_MAPS = 1, 2, 5, 6, 9, 12
F_MMAPABLE, F_INNER_MAP = 1 << 10, 1 << 12
ANY, NOEXIST, EXIST = 0, 1, 2  # what an update expects to find
PROG_TYPE_XDP = 6
LIVE_FRAMES = 1 << 1  # BPF_F_TEST_XDP_LIVE_FRAMES
XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = range(5)

BATCH = 1 << 16  # entries moved by one call
ENOTSUPP = 524  # the kernel's own: this type of map has no such batch

ffi = FFI()
ffi.cdef("""
typedef uint32_t u32;
typedef uint64_t u64;

struct bpf_map_info {
    u32 type, id, key_size, value_size, max_entries, map_flags;
    char name[16];
    u64 rest[8];
};

struct bpf_prog_info {
    u32 type, id;
    uint8_t tag[8];
    u32 jited_prog_len, xlated_prog_len;
    u64 jited_prog_insns, xlated_prog_insns, load_time;
    u32 created_by_uid, nr_map_ids;
    u64 map_ids;
    char name[16];
    u32 ifindex, gpl_compatible;
    u64 netns_dev, netns_ino;
    u32 nr_jited_ksyms, nr_jited_func_lens;
    u64 jited_ksyms, jited_func_lens;
    u32 btf_id, func_info_rec_size;
    u64 func_info;
    u32 nr_func_info, nr_line_info;
    u64 line_info, jited_line_info;
    u32 nr_jited_line_info, line_info_rec_size, jited_line_info_rec_size, nr_prog_tags;
    u64 prog_tags, run_time_ns, run_cnt, recursion_misses;
    u32 verified_insns, attach_btf_obj_id, attach_btf_id, pad;
};

struct bpf_map_create_opts {
    size_t sz;
    u32 btf_fd, btf_key_type_id, btf_value_type_id, btf_vmlinux_value_type_id;
    u32 inner_map_fd, map_flags;
    u64 map_extra;
    u32 numa_node, map_ifindex;
};

struct bpf_map_batch_opts { size_t sz; u64 elem_flags, flags; };

struct bpf_test_run_opts {
    size_t sz;
    const void *data_in;
    void *data_out;
    u32 data_size_in, data_size_out;
    const void *ctx_in;
    void *ctx_out;
    u32 ctx_size_in, ctx_size_out;
    int retval, repeat;
    u32 duration, flags, cpu, batch_size;
};

int bpf_obj_get(const char *path);
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get_info_by_fd(int fd, void *info, u32 *size);
int bpf_map_get_fd_by_id(u32 id);
int bpf_prog_get_fd_by_id(u32 id);
int bpf_map_create(int type, const char *name, u32 key_size, u32 value_size, u32 max_entries,
                   const struct bpf_map_create_opts *opts);
int bpf_map_update_elem(int fd, const void *key, const void *value, u64 flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_get_next_key(int fd, const void *key, void *next);
int bpf_map_update_batch(int fd, const void *keys, const void *values, u32 *count,
                         const struct bpf_map_batch_opts *opts);
int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, u32 *count,
                         const struct bpf_map_batch_opts *opts);
int bpf_map_delete_batch(int fd, const void *keys, u32 *count, const struct bpf_map_batch_opts *opts);
int bpf_prog_load(int type, const char *name, const char *license, const void *insns, size_t insn_cnt,
                  void *opts);
int bpf_prog_test_run_opts(int fd, struct bpf_test_run_opts *opts);
int bpf_enable_stats(int type);
int libbpf_num_possible_cpus(void);
int libbpf_set_print(void *function);

int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *options);
""")
_lib: Any = ffi.dlopen("libbpf.so.1")  # what cdef declares, types-cffi cannot know
_lib.libbpf_set_print(ffi.NULL)

_libc: Any = ffi.dlopen(None)

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class MapInfo:
    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Two maps of equal shape can stand in for each other."""
        return self.type, self.key_size, self.value_size, self.max_entries, self.flags


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """tag: of the instructions, as the kernel computes it. verified: instructions the verifier walked."""

    type: int
    id: int
    tag: str
    name: str
    instructions: int
    verified: int


def _new(ctype: str, init: object = None) -> Any:
    return ffi.new(ctype, init)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise DataplaneError(f"{what}: {os.strerror(-result)}", -result)
    return result


def _text(chars: Any) -> str:
    return bytes(ffi.buffer(chars)).split(b"\0")[0].decode()


def _map_name(fd: int) -> str:
    try:
        return map_info(fd).name
    except DataplaneError:
        return f"map descriptor {fd}"


def _failed(fd: int, deed: str, result: int) -> DataplaneError:
    return DataplaneError(f"{_map_name(fd)}: {deed}: {os.strerror(-result)}", -result)


# ---- pins ---------------------------------------------------------------------------------------


def ensure_bpffs(path: Path) -> None:
    """Make `path` a directory in bpffs; mounts one at /sys/fs/bpf, or at `path` if that is elsewhere."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _filesystem(path.parent) != "bpf" and _filesystem(path) != "bpf":
            usual = Path("/sys/fs/bpf")
            at = usual if path.is_relative_to(usual) else path
            at.mkdir(exist_ok=True)
            if _libc.mount(b"bpf", os.fsencode(at), b"bpf", 0, b"mode=0700") != 0:
                raise DataplaneError(f"{at}: cannot mount bpffs: {os.strerror(ffi.errno)}", ffi.errno)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataplaneError(f"{path}: {error.strerror}", error.errno or 0) from error


def _filesystem(path: Path) -> str:
    """The type of the file system that `path` is on, or would be."""
    best, kind = Path(), ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4])
        if path.resolve().is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, rest.split()[0]
    return kind


def obj_get(path: Path) -> int:
    """Open a pinned map or program."""
    return _checked(_lib.bpf_obj_get(os.fsencode(path)), str(path))


def obj_pin(fd: int, path: Path) -> None:
    _checked(_lib.bpf_obj_pin(fd, os.fsencode(path)), str(path))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A pinned map or program for the length of a block."""
    fd = obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)


# ---- maps ---------------------------------------------------------------------------------------


def map_info(fd: int) -> MapInfo:
    info = _new("struct bpf_map_info *")
    size = ffi.new("u32 *", ffi.sizeof("struct bpf_map_info"))
    _checked(_lib.bpf_obj_get_info_by_fd(fd, info, size), f"map descriptor {fd}")
    return MapInfo(
        info.type,
        info.id,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.map_flags,
        _text(info.name),
    )


def map_fd_by_id(map_id: int) -> int:
    return _checked(_lib.bpf_map_get_fd_by_id(map_id), f"map {map_id}")


@contextmanager
def map_by_id(map_id: int) -> Iterator[int]:
    fd = map_fd_by_id(map_id)
    try:
        yield fd
    finally:
        os.close(fd)


def map_create(
    kind: int, name: str, key_size: int, value_size: int, max_entries: int, flags: int = 0, inner_fd: int = 0
) -> int:
    opts = _new("struct bpf_map_create_opts *")
    opts.sz = ffi.sizeof("struct bpf_map_create_opts")
    opts.map_flags, opts.inner_map_fd = flags, inner_fd
    fd = _lib.bpf_map_create(kind, name[:15].encode(), key_size, value_size, max_entries, opts)
    return _checked(fd, f"{name}: cannot create the map")


@contextmanager
def new_ring(size: int) -> Iterator[int]:
    """An array of `size` bytes for the outer map, all zero; gone after the block if no outer map has it."""
    fd = map_create(MAP_ARRAY, "ring", 4, 8, size // 8, F_MMAPABLE | F_INNER_MAP)
    try:
        yield fd
    finally:
        os.close(fd)


def map_mmap(fd: int, size: int) -> mmap.mmap:
    """The content of an array map made with F_MMAPABLE, to read and write in place.

    Values have a stride of 8 bytes or a multiple; the mapping is whole pages.
    """
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        return mmap.mmap(fd, pages)
    except OSError as error:
        raise DataplaneError(f"{_map_name(fd)}: mmap: {error.strerror}", error.errno or 0) from error


def map_update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    if (result := _lib.bpf_map_update_elem(fd, key, value, flags)) < 0:
        raise _failed(fd, "update", result)


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """None: no such key. value_size: as value_bytes() tells."""
    value = bytearray(value_size)
    result = _lib.bpf_map_lookup_elem(fd, key, ffi.from_buffer(value))
    if result == -errno.ENOENT:
        return None
    if result < 0:
        raise _failed(fd, "lookup", result)
    return bytes(value)


def map_delete(fd: int, key: bytes) -> bool:
    """False: there was no such key."""
    result = _lib.bpf_map_delete_elem(fd, key)
    if result < 0 and result != -errno.ENOENT:
        raise _failed(fd, "delete", result)
    return bool(result == 0)


def map_keys(fd: int) -> Iterator[bytes]:
    """One by one; a key that is deleted while we are at it makes the kernel start over."""
    size = map_info(fd).key_size
    key, after = None, bytearray(size)
    while (result := _lib.bpf_map_get_next_key(fd, key or ffi.NULL, ffi.from_buffer(after))) == 0:
        key = bytes(after)
        yield key
    if result != -errno.ENOENT:
        raise _failed(fd, "next key", result)


def map_dump(fd: int) -> tuple[bytes, bytes]:
    """All keys and all values, end to end; a value of a per-CPU map is value_bytes() long.

    In a hash map what is inserted or deleted meanwhile may be missing; nothing is there twice.
    """
    info = map_info(fd)
    size, stride = min(BATCH, info.max_entries), value_bytes(info)
    all_keys, all_values = bytearray(), bytearray()
    opts = _batch_opts(0)
    token = ffi.new("char[]", max(8, info.key_size))
    start = ffi.NULL
    while True:
        keys, values = bytearray(size * info.key_size), bytearray(size * stride)
        count = ffi.new("u32 *", size)
        result = _lib.bpf_map_lookup_batch(
            fd, start, token, ffi.from_buffer(keys), ffi.from_buffer(values), count, opts
        )
        if result == -errno.ENOSPC:  # a bucket holds more than we have room for
            size *= 2
            continue
        if result < 0 and result != -errno.ENOENT:
            raise _failed(fd, "lookup batch", result)
        all_keys += keys[: count[0] * info.key_size]
        all_values += values[: count[0] * stride]
        if result == -errno.ENOENT:
            return bytes(all_keys), bytes(all_values)
        start = token


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int, flags: int = ANY) -> None:
    """Keys and values lie end to end. In an array of maps this is one grace period, however many it swaps."""
    if count:
        done = ffi.new("u32 *", count)
        if (result := _lib.bpf_map_update_batch(fd, keys, values, done, _batch_opts(flags))) < 0:
            raise _failed(fd, f"update batch, entry {done[0]} of {count}", result)


def map_delete_keys(fd: int, keys: Sequence[bytes]) -> None:
    """Keys that are not there are no error."""
    opts = _batch_opts(0)
    at = 0
    while at < len(keys):
        count = ffi.new("u32 *", len(keys) - at)
        result = _lib.bpf_map_delete_batch(fd, b"".join(keys[at:]), count, opts)
        if result == -ENOTSUPP:
            for key in keys[at:]:
                map_delete(fd, key)
        elif result == -errno.ENOENT:
            at += count[0] + 1  # the batch ends at a missing key: go on after it
            continue
        elif result < 0:
            raise _failed(fd, "delete batch", result)
        return


def array_u32(fd: int) -> dict[int, int]:
    """Index -> u32 of an array, without the empty places; of an array of maps, the inner maps' ids."""
    try:
        keys, values = map_dump(fd)
    except DataplaneError as error:
        if error.errno not in (errno.EINTR, ENOTSUPP):  # so say older kernels when they meet empty places
            raise
    else:
        with memoryview(keys) as indices, memoryview(values) as held:
            return dict(zip(indices.cast("I"), held.cast("I"), strict=True))
    found: dict[int, int] = {}
    value = ffi.new("u32 *")
    key = ffi.new("u32 *")
    for index in range(map_info(fd).max_entries):
        key[0] = index
        result = _lib.bpf_map_lookup_elem(fd, key, value)
        if result == 0:
            found[index] = value[0]
        elif result != -errno.ENOENT:
            raise _failed(fd, "lookup", result)
    return found


def value_bytes(info: MapInfo) -> int:
    """Of one value as calls move it: a per-CPU map has one for each possible CPU, in steps of 8 bytes."""
    if info.type in (MAP_PERCPU_HASH, MAP_PERCPU_ARRAY):
        return -(-info.value_size // 8) * 8 * cpus()
    return info.value_size


def cpus() -> int:
    """How many values a per-CPU map holds for a key."""
    return _checked(_lib.libbpf_num_possible_cpus(), "possible CPUs")


def percpu_u64(fd: int, index: int) -> list[int]:
    """The words at `index` of a per-CPU array: those of the first CPU, of the second, and so on."""
    raw = map_lookup(fd, _u32(index), value_bytes(map_info(fd)))
    if raw is None:
        raise DataplaneError(f"{_map_name(fd)}: no entry {index}", errno.ENOENT)
    return list(memoryview(raw).cast("Q"))


def percpu_counters(fd: int, indices: Iterable[int]) -> dict[int, tuple[int, int]]:
    """(packets, bytes) of each `struct counter`, sums over the CPUs."""
    size = value_bytes(map_info(fd))
    raw, key = ffi.new("u64[]", size // 8), ffi.new("u32 *")
    found: dict[int, tuple[int, int]] = {}
    for key[0] in indices:
        if (result := _lib.bpf_map_lookup_elem(fd, key, raw)) < 0:
            raise _failed(fd, f"lookup of entry {key[0]}", result)
        words = list(raw)
        found[key[0]] = sum(words[::2]), sum(words[1::2])
    return found


def percpu_zero(fd: int, index: int) -> None:
    map_update(fd, _u32(index), bytes(value_bytes(map_info(fd))))


def _batch_opts(elem_flags: int) -> Any:
    return _new("struct bpf_map_batch_opts *", [ffi.sizeof("struct bpf_map_batch_opts"), elem_flags, 0])


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


# ---- programs -----------------------------------------------------------------------------------


def prog_info(fd: int) -> ProgInfo:
    info = _new("struct bpf_prog_info *")
    size = ffi.new("u32 *", ffi.sizeof("struct bpf_prog_info"))
    _checked(_lib.bpf_obj_get_info_by_fd(fd, info, size), f"program descriptor {fd}")
    return ProgInfo(
        info.type,
        info.id,
        bytes(info.tag).hex(),
        _text(info.name),
        info.xlated_prog_len // 8,
        info.verified_insns,
    )


def prog_fd_by_id(prog_id: int) -> int:
    return _checked(_lib.bpf_prog_get_fd_by_id(prog_id), f"program {prog_id}")


def prog_load(name: str, instructions: bytes) -> int:
    """An XDP program of raw 8-byte instructions."""
    fd = _lib.bpf_prog_load(
        PROG_TYPE_XDP, name[:15].encode(), b"Dual BSD/GPL", instructions, len(instructions) // 8, ffi.NULL
    )
    return _checked(fd, f"program {name}")


def load_verdict(verdict: int) -> int:
    """A program that gives every packet this verdict; veth wants one on the peer of an XDP_TX device."""
    return prog_load("verdict", b"\xb7\0\0\0" + _u32(verdict) + b"\x95" + bytes(7))


def prog_run(fd: int, frame: Buffer, repeat: int = 1) -> tuple[int, bytes]:
    """Let the program have this frame. Returns its verdict, and the frame as it left it."""
    out = bytearray(len(frame) + 512)
    opts = _run_opts(frame, repeat)
    opts.data_out, opts.data_size_out = ffi.from_buffer(out), len(out)
    _checked(_lib.bpf_prog_test_run_opts(fd, opts), f"test run of program {prog_info(fd).name}")
    return opts.retval & 0xFFFFFFFF, bytes(out[: opts.data_size_out])


def prog_run_live(fd: int, frame: Buffer, repeat: int, batch: int = 64) -> None:
    """Send `repeat` frames through the program, and where its verdict says, as the kernel would do."""
    opts = _run_opts(frame, repeat)
    opts.flags, opts.batch_size = LIVE_FRAMES, batch
    _checked(_lib.bpf_prog_test_run_opts(fd, opts), f"live run of program {prog_info(fd).name}")


def _run_opts(frame: Buffer, repeat: int) -> Any:
    opts = _new("struct bpf_test_run_opts *")
    opts.sz = ffi.sizeof("struct bpf_test_run_opts")
    opts.data_in, opts.data_size_in, opts.repeat = ffi.from_buffer(frame), len(frame), repeat
    return opts


@contextmanager
def run_stats_enabled() -> Iterator[None]:
    """The kernel counts time and runs of all programs, at a small cost for each run."""
    fd = _checked(_lib.bpf_enable_stats(0), "enable run-time statistics")
    try:
        yield
    finally:
        os.close(fd)


def run_stats(fd: int) -> tuple[int, int]:
    """(ns, runs) of a program since statistics were enabled first."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["run_time_ns"]), int(fields["run_cnt"])
