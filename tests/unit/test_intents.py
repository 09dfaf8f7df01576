"""Drains outlive the agent; a file that is damaged stops the start and is left alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core.state import Drained
from lbagent.errors import ConfigError, LbAgentError
from lbagent.intents import Intents

DRAIN = Drained("web", "n1", "web-1", "a disk", 1700000000.25)

names = st.text(st.characters(exclude_categories=["Cs"]))
drains = st.lists(st.builds(Drained, names, names, names, names, st.floats(0, 2e9)), max_size=4)


@settings(deadline=None)
@given(drains)
def test_what_was_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, saved: list[Drained]) -> None:
    path = tmp_path_factory.mktemp("state") / "deep" / "intents.json"
    Intents(path).save([DRAIN])
    Intents(path).save(saved)
    assert sorted(Intents(path).load(), key=str) == sorted(saved, key=str)
    assert os.listdir(path.parent) == ["intents.json"]  # noqa: PTH208


def test_no_file_means_no_drains(tmp_path: Path) -> None:
    assert Intents(tmp_path / "intents.json").load() == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "drains": []}',
        b'{"version": 1, "drains": [{"service": "web"}]}',
        b'{"version": 1, "drains": [], "undrains": []}',
    ],
)
def test_a_damaged_file_stops_the_start_and_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "intents.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        Intents(path).load()
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Intents(tmp_path).load()


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intents = Intents(tmp_path / "intents.json")
    intents.save([DRAIN])

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LbAgentError, match="No space left"):
        intents.save([])
    assert intents.load() == (DRAIN,)


def test_file_and_folder_are_synced_around_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(fd: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def note_replace(self: Path, target: Path) -> Path:
        done.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    Intents(tmp_path / "intents.json").save([DRAIN])
    assert done == ["file", "replace", "folder"]
