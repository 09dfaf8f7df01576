"""What may not stay behind: namespaces, pins in bpffs, XDP programs, processes.

    python -m tests.leftovers before FILE    notes what is there
    python -m tests.leftovers after FILE     prints what is there now and was not before; exit 1 if any is

A process is of a run if its environment has the run's mark: LBAGENT_RUN=<anything unique>, set by the one
who started the run and handed down to every child.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "LBAGENT_RUN"
PATIENCE_S = 5.0  # the kernel lets go of programs and processes a little later than asked


def traces() -> set[str]:
    """All that could have been left behind, by whomever."""
    return {
        *(f"namespace {path.name}" for path in Path("/run/netns").glob("*")),
        *(f"pin {path}" for path in Path("/sys/fs/bpf").rglob("*")),
        *(f"XDP program {number}" for number in xdp_programs()),
        *processes(os.environ.get(MARK, "")),
    }


def left_behind(before: set[str], is_ours: Callable[[str], bool] = lambda trace: True) -> list[str]:
    """What is there and was not before, once the kernel had its time. is_ours: what to look at."""
    end = time.monotonic() + PATIENCE_S
    while (left := set(filter(is_ours, traces() - before))) and time.monotonic() < end:
        time.sleep(0.05)
    return sorted(left)


def xdp_programs() -> Iterator[int]:
    """The ids of all XDP programs that the kernel holds, whoever holds on to them."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    number = ctypes.c_uint32(0)
    while libbpf.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        fd = libbpf.bpf_prog_get_fd_by_id(number)
        if fd >= 0:
            head = (ctypes.c_uint32 * 2)()  # struct bpf_prog_info begins with type and id
            size = ctypes.c_uint32(ctypes.sizeof(head))
            libbpf.bpf_obj_get_info_by_fd(fd, head, ctypes.byref(size))
            os.close(fd)
            if head[0] == 6:  # BPF_PROG_TYPE_XDP
                yield number.value


def processes(mark: str) -> Iterator[str]:
    """Processes of this run but for this one and those that it comes from."""
    if not mark:
        return
    ancestors = set()
    pid = os.getpid()
    while pid:
        ancestors.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it just ended, or is not ours to read
        if f"{MARK}={mark}".encode() in environment and int(folder.name) not in ancestors:
            yield f"process {folder.name} {words}"


def main() -> int:
    match sys.argv[1:]:
        case ["before", file]:
            Path(file).write_text(json.dumps(sorted(traces())))
        case ["after", file]:
            left = left_behind(set(json.loads(Path(file).read_text())))
            print("".join(f"left behind: {trace}\n" for trace in left), end="")
            return 1 if left else 0
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
