"""The pinned program: find it, have it built, replace another one by it, take it away.

Everything of one build is pinned in `<pin_root>/<digest>/`: its maps by their names and the program by its
own. A directory of another name there is unfinished, its maker died: it is removed at the next start. The
agent itself never compiles (docs/adr/0002); attaching is left to lbagent.links.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import IPv4Network
from pathlib import Path
from typing import Protocol

import structlog

from lbagent.core.model import Capacity
from lbagent.dataplane import carry, libbpf, sources
from lbagent.errors import DataplaneError

COMPILE_S = 60  # it takes one; an overloaded machine may need some more
MESSAGE_LINES = 60  # of a compiler's or verifier's complaint
INDEX_SPARSE = 16  # places of the index for each VIP: with TCP and UDP, seven of eight are free
BUILDING, REMOVING = "new-", "old-"  # no dots: bpffs refuses them

log = structlog.get_logger()


class Build(Protocol):
    """What is to be built. `name` is that of the C file, of its function and of the program's pin."""

    @property
    def name(self) -> str: ...
    @property
    def pin_root(self) -> Path: ...
    def defines(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """The load balancer. encap_source: outer source addresses are taken from it, one for each flow."""

    capacity: Capacity
    seed: int
    encap_source: IPv4Network
    pin_root: Path
    name: str = "lb"

    def defines(self) -> Mapping[str, str]:
        return {
            "LB_VIPS": str(self.capacity.vips),
            "LB_INDEX_BITS": str((INDEX_SPARSE * self.capacity.vips - 1).bit_length()),
            "LB_REALS": str(self.capacity.reals),
            "LB_FLOWS": str(self.capacity.flows),
            "LB_SEED": f"{self.seed:#x}ULL",
            "LB_ENCAP_SOURCE": f"{int(self.encap_source.network_address):#x}",
            "LB_ENCAP_SOURCE_BITS": str(self.encap_source.prefixlen),
        }


@dataclass(frozen=True, slots=True)
class DecapSettings:
    """What takes the outer header off on a backend, for up to `addresses` addresses."""

    addresses: int
    pin_root: Path
    name: str = "decap"

    def defines(self) -> Mapping[str, str]:
        return {"DECAP_ADDRESSES": str(self.addresses)}


@dataclass(frozen=True, slots=True)
class Pinned:
    """A complete build. adopted: it was there before it was asked for."""

    name: str
    digest: str
    directory: Path
    adopted: bool = field(default=True, compare=False)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The program's descriptor, for the length of a block."""
        with libbpf.opened(self.directory / self.name) as fd:
            yield fd

    def info(self) -> libbpf.ProgInfo:
        with self.opened() as fd:
            return libbpf.prog_info(fd)


def digest(build: Build) -> str:
    """12 hex digits of all that the program depends on: its sources and -D values."""
    folder = sources.folder()
    files = [folder / f"{build.name}.bpf.c", *sorted(folder.rglob("*.h"))]
    texts = [f"{file.relative_to(folder)}\n{file.read_text()}" for file in files]
    return sha256("\0".join([*texts, repr(sorted(build.defines().items()))]).encode()).hexdigest()[:12]


def find(build: Build) -> list[Pinned]:
    """All complete builds of this program in its pin_root, the latest first."""
    if not build.pin_root.is_dir():
        return []
    found = [
        Pinned(build.name, folder.name, folder)
        for folder in build.pin_root.iterdir()
        if not folder.name.startswith((BUILDING, REMOVING)) and (folder / build.name).exists()
    ]
    return sorted(found, key=lambda pinned: pinned.info().id, reverse=True)


def ensure(build: Build) -> Pinned:
    """The build of this very digest: the one that is there, or a new one with the maps of the latest.

    Once it is attached everywhere, call `retire_others`. Raises DataplaneError with the compiler's or the
    verifier's own words; what was there before stays.
    """
    libbpf.ensure_bpffs(build.pin_root)
    _sweep(build)
    wanted, there = digest(build), find(build)
    for pinned in there:
        if pinned.digest == wanted:
            return pinned
    staging, directory = build.pin_root / (BUILDING + wanted), build.pin_root / wanted
    staging.mkdir()
    try:
        _compile(build, staging, there[0].directory if there else None)
        staging.rename(directory)
    except BaseException:
        _remove_folder(staging)
        raise
    return Pinned(build.name, wanted, directory, adopted=False)


def retire_others(build: Build, pinned: Pinned) -> None:
    """Let flow records that came up since the maps were taken over follow, then remove all other builds."""
    for other in find(build):
        if other.digest != pinned.digest:
            carry.late_flows(other.directory, pinned.directory)
            remove(other)


def remove(pinned: Pinned) -> None:
    """Unpin it. A program that is attached goes on; its maps live as long as it does."""
    doomed = pinned.directory.with_name(REMOVING + pinned.digest)
    try:
        pinned.directory.rename(doomed)
    except OSError as error:
        raise DataplaneError(f"{pinned.directory}: {error.strerror}", error.errno or 0) from error
    _remove_folder(doomed)


def remove_all(build: Build) -> None:
    """Every build, finished or not, and the then empty pin_root."""
    for pinned in find(build):
        remove(pinned)
    if build.pin_root.is_dir():
        _sweep(build)
        with contextlib.suppress(OSError):  # a mount point, or not only ours
            build.pin_root.rmdir()


def owns(build: Build, program_id: int) -> bool:
    """Is this attached program one of ours?"""
    return any(pinned.info().id == program_id for pinned in find(build))


def can_compile() -> bool:
    """bcc is there. It is Debian's python3-bpfcc, seen through --system-site-packages."""
    return importlib.util.find_spec("bcc") is not None


def _compile(build: Build, directory: Path, old: Path | None) -> None:
    """In a child: bcc's 60 MB are gone with it, and LLVM ends the whole process over some errors."""
    source = sources.folder() / f"{build.name}.bpf.c"
    command = [sys.executable, "-m", "lbagent.dataplane.compile", str(source), str(directory), str(old or "")]
    command += [f"{key}={value}" for key, value in build.defines().items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=COMPILE_S
        )
    except subprocess.TimeoutExpired as late:
        raise DataplaneError(f"{build.name}: not compiled after {COMPILE_S} s") from late
    if child.returncode != 0:
        words = child.stderr.strip().splitlines()[-MESSAGE_LINES:]
        raise DataplaneError("\n".join([f"{build.name}: cannot build the XDP program", *words]))
    log.info("program_built", program=build.name, directory=str(directory), carried_from=str(old or ""))


def _sweep(build: Build) -> None:
    for folder in build.pin_root.iterdir():
        if folder.name.startswith((BUILDING, REMOVING)):
            _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Flat, as all our folders are."""
    try:
        for pin in folder.iterdir():
            pin.unlink()
        folder.rmdir()
    except OSError as error:
        raise DataplaneError(f"{folder}: {error.strerror}", error.errno or 0) from error
