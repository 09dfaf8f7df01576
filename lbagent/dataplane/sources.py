"""Where the C sources are: bpf/ beside the package in a checkout, lbagent/bpf/ when installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Installed sources come with the package, so they win; a checkout has none there."""
    installed = PACKAGE / "bpf"
    return installed if installed.is_dir() else PACKAGE.parent / "bpf"
