"""Processes of the world: started in a host, logged to files, stopped by pid, gone with their parent."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.world.http import HttpError
from tests.world.net import Host, WorldError, undisturbed

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.02
PATIENCE_S = 30.0


def until(condition: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """Wait for the condition to be true, and return what it returned. Until then errors mean "not yet"."""
    end = time.monotonic() + patience_s
    last = ""
    while True:
        try:
            if result := condition():
                return result
        except (OSError, HttpError) as e:
            last = f" ({e})"
        if time.monotonic() > end:
            raise WorldError(f"waited {patience_s:.0f} s in vain: {what}{last}")
        time.sleep(POLL_S)


@dataclass(slots=True)
class Proc:
    """One process. `out` is what it prints, `log` what it says on stderr."""

    name: str
    popen: subprocess.Popen[bytes]
    out: Path
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        try:
            return self.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise WorldError(f"{self.name} (pid {self.pid}) did not end within {patience_s:.0f} s") from None

    def stop(self, sig: signal.Signals = signal.SIGTERM, patience_s: float = 10.0) -> int:
        """End it by `sig`, else by SIGKILL. Returns its exit code."""
        if self.is_running:
            self.popen.send_signal(sig)
            try:
                self.popen.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return self.popen.wait()

    def tail(self, lines: int = 15) -> str:
        text = (self.log.read_text(errors="replace") + self.out.read_text(errors="replace")).splitlines()
        return "\n".join(f"    {self.name}: {line}" for line in text[-lines:])


@dataclass(slots=True)
class Procs:
    """All processes of one world, and the folder where their files are."""

    folder: Path
    all: list[Proc] = field(default_factory=list)

    def start(self, host: Host, name: str, *argv: str, env: Mapping[str, str] | None = None) -> Proc:
        """Start argv in the host. It gets SIGKILL should this process die, no Ctrl-C of the terminal, and
        nothing of the Consul that the caller's environment may name."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CONSUL_")}
        log = self.folder / f"{name}.log"
        out = self.folder / f"{name}.out"
        with log.open("ab") as stderr, out.open("ab") as stdout:
            popen = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *host.enter, *argv),
                cwd=ROOT,
                env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        proc = Proc(name, popen, out, log)
        self.all.append(proc)
        return proc

    def stop_all(self) -> None:
        """Youngest first; all get the signal before any is waited for."""
        running = [proc for proc in reversed(self.all) if proc.is_running]
        for proc in running:
            proc.popen.terminate()
        for proc in running:
            proc.stop()


@contextlib.contextmanager
def procs(world: str) -> Iterator[Procs]:
    """A folder for files and logs, kept if the world ended in an error."""
    folder = Path(tempfile.mkdtemp(prefix=f"{world}-"))
    folder.chmod(0o755)
    made = Procs(folder)
    keep = False
    try:
        yield made
    except Exception as e:
        keep = True
        e.add_note(f"logs are kept in {folder}")
        raise
    finally:
        with undisturbed():
            made.stop_all()
            if not keep:
                shutil.rmtree(folder)
