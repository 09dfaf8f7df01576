"""The command line. `status`, `drain` and `undrain` ask the running agent; the others do the work themselves.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 the agent cannot be reached. What is slow to
import is imported by the command that needs it, so that asking is quick.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from lbagent.client import Client, Unreachable
from lbagent.core.options import duration_s
from lbagent.errors import LbAgentError, leaves

FAILED, UNREACHABLE = 1, 3
SOCKET = "/run/lbagent/admin.sock"  # as config.Admin has it
CONFIG = "/etc/lbagent/lbagent.toml"
LONGEST_WAIT_S = 3600

F = TypeVar("F", bound=Callable[..., object])


class Wait(click.ParamType[str]):
    """A time such as 60s, 5m or 1h; stays a text."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            duration_s(str(value), 0, LONGEST_WAIT_S)
        except ValueError:
            self.fail(f"{value} is not a time from 0s to 1h, such as 60s or 5m", param, ctx)
        return str(value)


def config_option(command: F) -> F:
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option(
        "--config", "path", type=path, default=CONFIG, show_default=True, envvar="LBAGENT_CONFIG",
        help="The TOML file to go by.",
    )(command)  # fmt: skip


def socket_option(command: F) -> F:
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option(
        "--socket", "path", type=path, default=SOCKET, show_default=True, envvar="LBAGENT_SOCKET",
        help="The agent's unix socket.",
    )(command)  # fmt: skip


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lbagent")
def main() -> None:
    """A layer-4 load balancer on XDP that Consul's catalogue configures by itself."""


# ---- what does the work itself ------------------------------------------------------------------


@main.command()
@config_option
@click.option("--dry-run", is_flag=True, help="Follow Consul and plan, but leave the kernel as it is.")
def run(path: Path, dry_run: bool) -> None:
    """Balance on this edge node, until SIGTERM; packets flow on after that. SIGHUP reads the file again."""
    with failing():
        gc.disable()
        import uvloop

        from lbagent import agent, config, logs

        gc.freeze()  # what was imported stays: walking it would hold up the loop, for 100 ms and more
        gc.enable()
        settings = config.load(path, os.environ).log
        logs.setup(settings.level, settings.format)
        uvloop.run(agent.run(path, dry_run))


@main.command()
@config_option
@json_option
def check(path: Path, as_json: bool) -> None:
    """Say whether configuration and kernel have what an edge node needs, and what to do if not."""
    with failing():
        import dataclasses

        from lbagent import logs
        from lbagent.check import Verdict
        from lbagent.check import check as examine

        logs.setup("warning")
        findings = examine(path, os.environ)
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        colours = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.MISSING: "red"}
        for finding in findings:
            verdict = click.style(f"{finding.verdict.value:8}", colours[finding.verdict])
            click.echo(f"{verdict} {finding.what}: {finding.text}")
            if finding.todo:
                click.echo(f"         -> {finding.todo}")
    if any(finding.verdict is Verdict.MISSING for finding in findings):
        sys.exit(FAILED)


@main.command()
@config_option
@click.option("--undo", is_flag=True, help="Take back all that was changed on this node, and end.")
def backend(path: Path, undo: bool) -> None:
    """Make this backend node fit to serve VIPs, and keep it so until SIGTERM; it serves on after that."""
    with failing():
        import uvloop

        from lbagent import backend, config, logs

        settings = config.load(path, os.environ, needs="backend")
        logs.setup(settings.log.level, settings.log.format)
        if undo:
            backend.undo(settings)
        else:
            uvloop.run(backend.run(settings))


@main.command()
@config_option
def detach(path: Path) -> None:
    """Take program and tables out of the kernel: from then on nothing is balanced here."""
    with failing():
        from lbagent import agent, config, logs

        settings = config.load(path, os.environ)
        logs.setup(settings.log.level, settings.log.format)
        agent.detach(settings)


# ---- what asks the agent ------------------------------------------------------------------------


@main.command()
@socket_option
@json_option
def status(path: Path, as_json: bool) -> None:
    """Show services, backends and what is wrong with them."""
    with failing():
        answer = Client(path).status()
    if as_json:
        print_json(answer)
    else:
        from lbagent.tables import status_text

        click.echo(status_text(answer, time.time()))


@main.command()
@click.argument("service")
@click.argument("backend", nargs=-1, required=True, metavar="NODE/ID | NODE ID")
@click.option("--reason", help="Kept with the drain, and shown.")
@click.option("--wait", type=Wait(), default="0s", help="How long to wait until it is empty, up to 1h.")
@socket_option
@json_option
def drain(
    service: str, backend: tuple[str, ...], reason: str | None, wait: str, path: Path, as_json: bool
) -> None:
    """Give a backend no new connections. With --wait, exit code 0 means that it is empty."""
    node, instance = node_and_id(backend)
    wait_s = duration_s(wait)
    with failing():
        answer = Client(path).drain(service, node, instance, reason, wait, wait_s)
    told(answer, as_json)
    if wait_s and not answer["empty"]:
        sys.exit(FAILED)


@main.command()
@click.argument("service")
@click.argument("backend", nargs=-1, required=True, metavar="NODE/ID | NODE ID")
@socket_option
@json_option
def undrain(service: str, backend: tuple[str, ...], path: Path, as_json: bool) -> None:
    """Take a drain back."""
    node, instance = node_and_id(backend)
    with failing():
        answer = Client(path).undrain(service, node, instance)
    told(answer, as_json)


def node_and_id(parts: tuple[str, ...]) -> tuple[str, str]:
    """An id may have slashes, a node's name has none."""
    if len(parts) == 1:
        node, slash, instance = parts[0].partition("/")
        parts = (node, instance) if slash else parts
    if len(parts) != 2 or not all(parts):
        raise click.UsageError("name the backend as NODE/ID or as NODE ID")
    return parts[0], parts[1]


def told(answer: Any, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        from lbagent.tables import backend_text

        click.echo(backend_text(answer))


def print_json(content: object) -> None:
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Errors that are meant for people become one message and an exit code; others end in a traceback."""
    try:
        yield
    except LbAgentError as error:
        fail(error)
    except BaseExceptionGroup as group:  # of a task group
        matching, rest = group.split(LbAgentError)
        if matching is None or rest is not None:
            raise
        fail(*leaves(matching))


def fail(*errors: BaseException) -> NoReturn:
    for error in errors:
        click.echo(f"lbagent: {error}", err=True)
    sys.exit(UNREACHABLE if any(isinstance(error, Unreachable) for error in errors) else FAILED)
