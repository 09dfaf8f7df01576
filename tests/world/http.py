"""Plain blocking HTTP requests from inside a host, or to a unix socket, for asking Consul and the agent."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from tests.world.net import Host, WorldError


class HttpError(WorldError):
    """An answer that is not 2xx."""

    def __init__(self, what: str, status: int, body: str) -> None:
        super().__init__(f"{what}: {status} {body.strip()}")
        self.status = status
        self.body = body


class Http:
    """Asks one server. `where` is (host to ask from, address, port), or the path of a unix socket."""

    def __init__(self, where: tuple[Host, str, int] | Path) -> None:
        self.where = where

    def __call__(self, method: str, path: str, body: object = None, timeout_s: float = 10) -> Any:
        """The answer: JSON if the server calls it so, else text. Raises HttpError if it is not 2xx."""
        connection = _Connection(self.where, timeout_s)
        try:
            payload = None if body is None else body if isinstance(body, str) else json.dumps(body)
            connection.request(method, path, payload)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status >= 300:
                raise HttpError(f"{method} {path}", response.status, text)
            return json.loads(text) if "json" in response.headers.get("Content-Type", "") else text
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, where: tuple[Host, str, int] | Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._where = where

    def connect(self) -> None:
        if isinstance(self._where, Path):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(self._where))
        else:
            host, address, port = self._where
            self.sock = host.socket()
            self.sock.settimeout(self.timeout)
            self.sock.connect((address, port))
