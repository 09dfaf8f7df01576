"""What lbagent and its tests use of Debian's python3-bpfcc."""

from collections.abc import Sequence

class Function:
    fd: int

class Table:
    map_fd: int

class BPF:
    XDP: int
    def __init__(self, *, text: bytes, cflags: Sequence[str]) -> None: ...
    def __getitem__(self, name: bytes) -> Table: ...
    def load_func(self, func_name: bytes, prog_type: int) -> Function: ...
    def cleanup(self) -> None: ...
