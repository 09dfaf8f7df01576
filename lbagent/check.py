"""What an edge node needs, looked at before it is needed; each finding says what to do about it.

Nothing stays changed: a file in the state directory and a program in the kernel, with its pins, are there
for a moment only.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import platform
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from lbagent import links
from lbagent.config import Config, load
from lbagent.consul import client
from lbagent.core.model import Capacity
from lbagent.dataplane import libbpf, program
from lbagent.errors import ConfigError, ConsulError, DataplaneError, LbAgentError

KERNEL = (5, 15)
CONSUL_S = 5.0
# linux/capability.h. The kernel hands out a ring in the map of rings by its id, and that takes SYS_ADMIN
# (kernel/bpf/syscall.c, bpf_map_get_fd_by_id), which includes BPF and PERFMON.
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
BCC = "apt install python3-bpfcc; make the venv by /usr/bin/python3 -m venv --system-site-packages"


class Verdict(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """todo: what to do about it, "" if nothing."""

    what: str
    verdict: Verdict
    text: str
    todo: str = ""


def check(path: Path, environ: Mapping[str, str]) -> list[Finding]:
    """All findings, in the order in which one would mend them. Blocks for some seconds."""
    findings: list[Finding] = []
    try:
        config = load(path, environ)
        findings.append(_ok("configuration", str(path)))
    except ConfigError as error:
        findings += [_missing("configuration", line, "correct it") for line in str(error).splitlines()]
        config = Config()  # for the probes that can do without
    for probe in PROBES:
        findings += probe(config)
    return findings


def _ok(what: str, text: str) -> Finding:
    return Finding(what, Verdict.OK, text)


def _missing(what: str, text: str, todo: str) -> Finding:
    return Finding(what, Verdict.MISSING, text, todo)


def _warning(what: str, text: str, todo: str) -> Finding:
    return Finding(what, Verdict.WARNING, text, todo)


# ---- probes -------------------------------------------------------------------------------------


def _kernel(_: Config) -> Iterator[Finding]:
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version >= KERNEL:
        yield _ok("kernel", release)
    else:
        yield _missing("kernel", f"{release} is older than {KERNEL[0]}.{KERNEL[1]}", "boot a newer one")


def _privileges(_: Config) -> Iterator[Finding]:
    lacking = lacking_capabilities(effective_capabilities())
    if lacking:
        yield _missing("privileges", f"no {', '.join(lacking)}", "run as root, or grant these")
    else:
        yield _ok("privileges", ", ".join(CAPABILITIES))


def lacking_capabilities(effective: int) -> list[str]:
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]


def effective_capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))


def _bpf(config: Config) -> Iterator[Finding]:
    """From the least that is needed to the whole program; what fails makes the rest pointless."""
    try:
        os.close(libbpf.load_verdict(libbpf.XDP_PASS))
    except DataplaneError as error:
        todo = "run as root" if error.errno == errno.EPERM else "use a kernel with CONFIG_BPF_SYSCALL"
        yield _missing("XDP", f"the kernel takes no program: {error}", todo)
        return
    yield _ok("XDP", "the kernel takes programs")
    if not program.can_compile():
        yield _missing("bcc", "the Python module bcc is not to be found", BCC)
        return
    yield _ok("bcc", "the Python module bcc is there")
    pin_dir, todo = config.edge.pin_dir, "mount -t bpf bpf /sys/fs/bpf"
    if mount := _bpffs_above(pin_dir):
        yield _ok("bpffs", f"mounted at {mount}")
        yield _build(_settings(config), mount)
    else:
        yield _warning("bpffs", f"not mounted for {pin_dir}; the agent will try to", todo)


def _bpffs_above(path: Path) -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4])
        if rest.split()[0] == "bpf" and path.is_relative_to(point):
            return point
    return None


def _build(settings: program.Settings, bpffs: Path) -> Finding:
    """Build it all, but not where the agent would, and take it away again."""
    trial = replace(settings, pin_root=bpffs / f"lbagent-check-{os.getpid()}")
    try:
        digest = program.ensure(trial).digest
    except DataplaneError as error:
        return _missing("program", str(error), "see the compiler's or the verifier's words")
    finally:
        program.remove_all(trial)
    return _ok("program", f"{digest} compiles, and the kernel's verifier accepts it")


def _settings(config: Config) -> program.Settings:
    edge = config.edge
    return program.Settings(
        Capacity(edge.vips, edge.reals, edge.flows), edge.seed, edge.encap_source, edge.pin_dir
    )


def _interfaces(config: Config) -> Iterator[Finding]:
    there = sorted(name for _, name in socket.if_nameindex())
    for name in config.edge.interfaces:
        if name in there:
            yield _interface(config, name)
        else:
            yield _missing("interface", f"{name} is not there", f"edge.interfaces may be {', '.join(there)}")


def _interface(config: Config, name: str) -> Finding:
    try:
        now = links.attached(name)
        is_ours = now is not None and program.owns(_settings(config), now[1])
    except (LbAgentError, OSError) as error:
        return _warning("interface", f"{name}: cannot tell which XDP program it has: {error}", "run as root")
    if now is None:
        return _ok("interface", f"{name}: no XDP program yet")
    if is_ours:
        return _ok("interface", f"{name}: our program, {now[0]} mode")
    todo = f"see `bpftool prog show id {now[1]}`; `ip link set dev {name} xdp off` removes it"
    return _missing("interface", f"{name}: has an XDP program that is not lbagent's, id {now[1]}", todo)


def _state(config: Config) -> Iterator[Finding]:
    directory = config.state.directory
    at = next(folder for folder in (directory, *directory.parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=at, prefix=".lbagent-check-"):
            pass
    except OSError as error:
        yield _missing(
            "state", f"cannot write to {at}: {error.strerror}", "give access, or set state.directory"
        )
    else:
        yield _ok("state", f"can write to {directory}" if at == directory else f"can make {directory}")


def _consul(config: Config) -> Iterator[Finding]:
    """Only a warning: the agent starts without it, and waits."""
    consul = config.consul
    try:
        count = asyncio.run(_opted_in(config))
    except (ConsulError, ConfigError) as error:
        yield _warning("Consul", f"{consul.address}: {error}", "start Consul's agent, or set [consul]")
    else:
        yield _ok("Consul", f'{consul.address} answers; {count} services have the tag "{consul.tag}"')


async def _opted_in(config: Config) -> int:
    async with client.connect(config.consul) as reader:
        answer = await reader.read("/v1/catalog/services", {}, CONSUL_S)
    try:
        catalog = msgspec.json.decode(answer.body, type=dict[str, list[str]])
    except msgspec.MsgspecError as error:
        raise ConsulError(f"what answers is not Consul: {error}") from error
    return sum(config.consul.tag in tags for tags in catalog.values())


PROBES: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    _kernel,
    _privileges,
    _bpf,
    _interfaces,
    _state,
    _consul,
)
