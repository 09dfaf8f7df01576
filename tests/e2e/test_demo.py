"""The demo itself: its words are a contract, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import MARK, left_behind, traces
from tests.world.procs import ROOT, until


def start(out: Path) -> subprocess.Popen[bytes]:
    with out.open("wb") as stdout:
        return subprocess.Popen(
            (sys.executable, "-B", "-m", "tests.demo", "--once"),
            cwd=ROOT,
            env={**os.environ, MARK: f"demo-{out.parent.name}"},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
        )


def last_line(out: Path) -> str:
    return out.read_text().splitlines()[-1]


def test_the_story_ends_well(tmp_path: Path) -> None:
    demo = start(tmp_path / "out")
    assert demo.wait(240) == 0, (tmp_path / "out").read_text()
    assert re.fullmatch(r"demo: ok, \d+ requests, \d+ failed", last_line(tmp_path / "out"))


@pytest.mark.parametrize(
    ("moment", "sig"),
    [
        ("A small world", signal.SIGINT),
        ("Service web registers", signal.SIGTERM),
        ("slow downloads begin", signal.SIGINT),
    ],
)
def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, sig: signal.Signals
) -> None:
    monkeypatch.setenv(MARK, f"demo-{tmp_path.name}")
    before = traces()
    demo = start(tmp_path / "out")
    until(lambda: moment in (tmp_path / "out").read_text(), f"the demo to say {moment!r}", 120)
    demo.send_signal(sig)
    assert demo.wait(60) == 1
    # It would also name an XDP program of its own that is still there.
    assert last_line(tmp_path / "out") == f"demo: FAILED, interrupted by {sig.name}"
    assert left_behind(before, lambda it: f"lb{demo.pid}" in it or it.startswith("process")) == []
