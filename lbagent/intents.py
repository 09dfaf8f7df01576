"""What operators intend, kept on disk: drains outlive the agent and the machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lbagent.core.state import Drained
from lbagent.errors import ConfigError, LbAgentError

VERSION = 1


class _Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    service: str
    node: str
    id: str
    reason: str
    since: float


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    drains: list[_Drain]


class Intents:
    """The file. It is replaced whole: a crash leaves the old one or the new one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> tuple[Drained, ...]:
        """Raises ConfigError when there is a file that cannot be understood; it is left as it is."""
        try:
            content = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read: {error.strerror}") from error
        except msgspec.DecodeError as error:
            why = (
                f"does not hold drains as they were saved: {error}; repair it, or move it away to forget them"
            )
            raise ConfigError(f"{self._path}: {why}") from error
        if content.version != VERSION:
            raise ConfigError(f"{self._path}: version is {content.version}: allowed is {VERSION}")
        return tuple(Drained(d.service, d.node, d.id, d.reason, d.since) for d in content.drains)

    def save(self, drains: Iterable[Drained]) -> None:
        """On the disk when it returns. Raises LbAgentError; then the file is the old one."""
        kept = sorted((_Drain(d.service, d.node, d.id, d.reason, d.since) for d in drains), key=_name)
        content = msgspec.json.format(msgspec.json.encode(_File(VERSION, kept)), indent=2)
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.write(content + b"\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # else the new name may be lost
            finally:
                os.close(folder)
        except OSError as error:
            raise LbAgentError(f"{self._path}: cannot be written: {error.strerror}") from error


def _name(drain: _Drain) -> tuple[str, str, str]:
    return drain.service, drain.node, drain.id
