"""A lock for the length of a run: two processes that change one node would each undo what the other does."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from lbagent.errors import ConfigError


@contextlib.contextmanager
def alone(directory: Path, name: str) -> Iterator[None]:
    """Hold `directory`/`name`.lock, which the kernel lets go of when the process ends, however it ends.

    Raises ConfigError when another process holds it, or the directory cannot be made.
    """
    with contextlib.ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((directory / f"{name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"state.directory is {directory}: another lbagent {name} uses it") from error
        except OSError as error:
            raise ConfigError(f"state.directory is {directory}: {error.strerror}") from error
        yield
