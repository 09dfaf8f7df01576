"""A unix socket to serve HTTP on, whose mode and group are right from its first moment."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

from lbagent.errors import ConfigError

SOCKET_MODE = 0o660


class UnixSite(web.BaseSite):
    """A site on a socket that listens already; aiohttp's own makes its socket with the umask's mode."""

    def __init__(self, runner: web.AppRunner, listener: socket.socket) -> None:
        super().__init__(runner)
        self._listener = listener

    @property
    def name(self) -> str:
        return f"http://unix:{self._listener.getsockname()}:"

    async def start(self) -> None:
        await super().start()
        server = self._runner.server
        assert server is not None
        self._server = await asyncio.get_running_loop().create_unix_server(server, sock=self._listener)


@contextlib.contextmanager
def unix_listener(path: Path, group: str | None) -> Iterator[socket.socket]:
    """A socket at `path` that from its first moment has its mode and group, for the length of a block.

    It takes the place of one on which nobody listens any more. Raises ConfigError.
    """
    new = path.with_name(path.name + ".new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_occupied(path)
        new.unlink(missing_ok=True)
        listener.bind(str(new))
        new.chmod(SOCKET_MODE)
        if group is not None:
            shutil.chown(new, group=group)
        listener.listen()
        new.replace(path)  # before listen() nobody could connect, so nobody was earlier than the mode
        ours = path.stat().st_ino
    except (OSError, LookupError) as error:
        listener.close()
        raise ConfigError(f"admin.socket {path}: {getattr(error, 'strerror', None) or error}") from error
    except BaseException:
        listener.close()
        raise
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            if path.stat().st_ino == ours:
                path.unlink()


def _refuse_occupied(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"admin.socket {path}: is there and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:  # its queue is full, so it is alive
            pass
    raise ConfigError(f"admin.socket {path}: another process listens there")
