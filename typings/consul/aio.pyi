# What lbagent uses of py-consul.

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from consul.base import Response

T = TypeVar("T")

class HTTPClient:
    def get(
        self,
        callback: Callable[[Response], T],
        path: str,
        params: Sequence[tuple[str, str]] | None = None,
        headers: dict[str, str] | None = None,
        *,
        connections_timeout: float | None = None,
    ) -> Awaitable[T]: ...

class Consul:
    http: HTTPClient
    def __init__(
        self,
        host: str,
        port: int,
        *,
        scheme: str,
        verify: bool | str,
        cert: tuple[str, str] | None,
        connections_limit: int,
    ) -> None: ...
    def close(self) -> Awaitable[None]: ...
