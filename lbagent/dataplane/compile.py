"""Compile a program with bcc and pin it, as a child: the agent itself never imports bcc.

    python -m lbagent.dataplane.compile SOURCE DIRECTORY OLD_DIRECTORY KEY=VALUE...

SOURCE is some NAME.bpf.c; its maps and the program NAME are pinned in DIRECTORY. The maps of OLD_DIRECTORY,
if one is given, are taken over. Errors are told on stderr by clang, by the verifier or by Python.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lbagent.dataplane import carry, libbpf


def build(source: Path, directory: Path, old: Path | None, defines: Sequence[str]) -> None:
    os.environ["BCC_KERNEL_SOURCE"] = str(source.parent)  # its include/ stands in for a kernel's headers
    from bcc import BPF

    name = source.name.removesuffix(".bpf.c")
    flags = [f"-I{source.parent}", f'-DPIN_DIR="{directory}"', *(f"-D{define}" for define in defines)]
    text = f'#line 1 "{source.name}"\n{source.read_text()}'.encode()
    if old is not None:
        BPF(text=text, cflags=flags).cleanup()  # creates the maps, as this build wants them
        carry.take_over(old, directory)
    module = BPF(text=text, cflags=flags)  # opens what is pinned, creates what is not
    libbpf.obj_pin(module.load_func(name.encode(), BPF.XDP).fd, directory / name)


def main() -> None:
    source, directory, old, *defines = sys.argv[1:]
    build(Path(source), Path(directory), Path(old) if old else None, defines)


if __name__ == "__main__":
    main()
