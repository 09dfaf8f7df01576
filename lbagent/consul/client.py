"""One request to Consul, and whether its answer may be believed at all."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
from consul import ConsulException
from consul import aio as py_consul
from consul.base import Response

from lbagent.errors import ConfigError, ConsulError

ANSWER_S = 10.0  # for an answer that need not wait, and on top of the wait of one that does


class Access(Protocol):
    """How to reach Consul, and the tag that opts in. token: used if there is no token_file.

    wait: s, of a blocking question. connections: at most that many at once; each blocking question holds one.
    """

    @property
    def address(self) -> str: ...
    @property
    def token_file(self) -> Path | None: ...
    @property
    def token(self) -> str: ...
    @property
    def auth(self) -> str: ...
    @property
    def ca_file(self) -> Path | None: ...
    @property
    def cert_file(self) -> Path | None: ...
    @property
    def key_file(self) -> Path | None: ...
    @property
    def verify(self) -> bool: ...
    @property
    def datacenter(self) -> str | None: ...
    @property
    def tag(self) -> str: ...
    @property
    def wait(self) -> int: ...
    @property
    def connections(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A 200. filtered: things were left out that the token may not read."""

    body: str
    index: int = 1
    filtered: bool = False


class Reader(Protocol):
    def read(self, path: str, params: Mapping[str, str], deadline_s: float) -> Awaitable[Answer]:
        """Raises ConsulError when there is no answer that may be believed."""


class Client:
    """Requests to Consul's HTTP API by py-consul, which would drop the headers that tell what to believe."""

    def __init__(self, access: Access, consul: py_consul.Consul) -> None:
        self._access = access
        self._consul = consul
        self._plain = asyncio.Semaphore(_spare(access))
        self._blocking = asyncio.Semaphore(blocking(access))

    async def read(self, path: str, params: Mapping[str, str], deadline_s: float) -> Answer:
        extra = {"dc": self._access.datacenter} if self._access.datacenter else {}
        query = [*params.items(), *extra.items()]
        headers = self._headers()
        try:
            async with self._blocking if "index" in params else self._plain, asyncio.timeout(deadline_s):
                response = await self._consul.http.get(
                    lambda response: response, path, query, headers, connections_timeout=deadline_s + 1
                )
        except TimeoutError as error:
            raise ConsulError(f"no answer within {deadline_s:.0f} s") from error
        except (aiohttp.ClientError, ConsulException, OSError, ValueError) as error:
            raise ConsulError(f"{type(error).__name__}: {error}") from error
        return _believable(response)

    def _headers(self) -> dict[str, str]:
        """The token file is read each time, so a token may be replaced while we run.

        Consul's own variable cannot override it here: py-consul adds its token elsewhere.
        """
        token = self._access.token
        if self._access.token_file is not None:
            try:
                token = self._access.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConsulError(f"token file {self._access.token_file}: {error}") from error
        headers = {"X-Consul-Token": token} if token else {}
        if self._access.auth:
            headers["Authorization"] = "Basic " + base64.b64encode(self._access.auth.encode()).decode()
        return headers


def _believable(response: Response) -> Answer:
    if response.code != 200:
        raise ConsulError(f"HTTP {response.code}: {response.body.strip()[:200]}")
    if response.headers.get("X-Consul-KnownLeader") == "false":
        raise ConsulError("the servers have no leader")
    index = response.headers.get("X-Consul-Index", "0")
    if not index.isdecimal():
        raise ConsulError(f"X-Consul-Index is {index[:40]}, no number")
    filtered = response.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true"
    return Answer(response.body, int(index), filtered)


@contextlib.asynccontextmanager
async def connect(access: Access) -> AsyncIterator[Reader]:
    """A client for this event loop. Raises ConfigError for certificates that cannot be used."""
    parts = urlsplit(access.address)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    verify = str(access.ca_file) if access.verify and access.ca_file else access.verify
    cert = (str(access.cert_file), str(access.key_file)) if access.cert_file else None
    try:
        consul = py_consul.Consul(
            host,
            parts.port or 8500,
            scheme=parts.scheme,
            verify=verify,
            cert=cert,
            connections_limit=access.connections,
        )
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"consul's certificates (ca_file, cert_file, key_file): {error}") from error
    try:
        yield Client(access, consul)
    finally:
        await consul.close()


Connect = Callable[[Access], AbstractAsyncContextManager[Reader]]


def blocking(access: Access) -> int:
    """How many blocking questions may be under way; what is spare is for those that need not wait."""
    return access.connections - _spare(access)


def _spare(access: Access) -> int:
    return max(1, access.connections // 5)


def read(reader: Reader, path: str, index: int, wait_s: int) -> Awaitable[Answer]:
    """index: of the last answer, 0: do not wait. Servers wait up to 17/16 of wait_s, to spread the load."""
    if not index:
        return reader.read(path, {}, ANSWER_S)
    return reader.read(path, {"index": str(index), "wait": f"{wait_s}s"}, wait_s * 17 / 16 + ANSWER_S)


def read_consistent(reader: Reader, path: str) -> Awaitable[Answer]:
    """What a majority of the servers holds for true."""
    return reader.read(path, {"consistent": ""}, ANSWER_S)
