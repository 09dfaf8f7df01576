"""`lbagent check` on this very kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lbagent.check import Verdict, check


def config(tmp_path: Path, interface: str) -> Path:
    path = tmp_path / "lbagent.toml"
    path.write_text(
        f'[edge]\ninterfaces = ["{interface}"]\n'
        f'[state]\ndirectory = "{tmp_path}/state"\n'
        '[consul]\naddress = "http://127.0.0.1:1"\n'
    )
    return path


def test_this_machine_has_what_it_needs_and_stays_as_it_was(tmp_path: Path) -> None:
    before = {path.name for path in Path("/sys/fs/bpf").glob("lbagent-check-*")}
    findings = check(config(tmp_path, "lo"), {})
    assert [f for f in findings if f.verdict is Verdict.MISSING] == []
    assert {f.what: f.verdict for f in findings}["Consul"] is Verdict.WARNING
    assert "program" in {f.what for f in findings}
    assert {path.name for path in Path("/sys/fs/bpf").glob("lbagent-check-*")} == before
    assert not (tmp_path / "state").exists()


def test_a_missing_device_is_named(tmp_path: Path) -> None:
    findings = check(config(tmp_path, "nowhere0"), {})
    missing = [f for f in findings if f.verdict is Verdict.MISSING]
    assert [f.text for f in missing] == ["nowhere0 is not there"]
    assert "lo" in missing[0].todo


def test_missing_privileges_are_named(tmp_path: Path) -> None:
    unprivileged = ("setpriv", "--bounding-set=-all", sys.executable, "-m", "lbagent")
    told = subprocess.run(
        [*unprivileged, "check", f"--config={config(tmp_path, 'lo')}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 1
    assert "missing  privileges: no CAP_NET_ADMIN, CAP_SYS_ADMIN" in told.stdout
    assert "missing  XDP: " in told.stdout
