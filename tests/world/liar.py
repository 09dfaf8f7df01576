"""A proxy between an agent and a real Consul that can lie, fail, stall and drip.

It forwards until it is told to lie. A lie also ends the blocking questions that are under way, as a Consul
that restarts does. As a process of its own (python -m tests.world.liar PORT UPSTREAM) it is told by
PUT /liar with the JSON of a Lie, and by DELETE /liar.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import sys
from collections.abc import AsyncIterator

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict

DRIP_S = 0.05  # between two bytes
HOPS = (
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "content-encoding",
    "date",
    "server",
)


class Kind(enum.StrEnum):
    EMPTY = "empty"  # 200, {} or []
    FILTERED = "filtered"  # 200, {} or [], and the header that says that ACLs did it
    BACKWARDS = "backwards"  # the truth, with an index of 1
    LEADERLESS = "leaderless"  # 200, empty, X-Consul-KnownLeader: false
    NONSENSE = "nonsense"  # 200, another kind of JSON
    TRUNCATED = "truncated"  # the truth, cut off in the middle
    TOO_MANY = "too_many"  # 429
    ERROR = "error"  # 500
    HANG = "hang"  # no answer until the lie is over
    DRIP = "drip"  # the truth, byte by byte
    RESET = "reset"  # the connection is closed


class Lie(msgspec.Struct, frozen=True):
    """path: of what it lies, a beginning. consistent: it lies in consistent reads, too."""

    kind: Kind
    path: str = "/v1/"
    consistent: bool = True


class Liar:
    """told: how many questions got a lie for an answer."""

    def __init__(self, upstream: str) -> None:
        self.told = 0
        self._upstream = upstream
        self._lie: Lie | None = None
        self._changed = asyncio.Event()
        self._session: ClientSession | None = None

    def lie(self, lie: Lie | None) -> None:
        """From now on; None: tell the truth."""
        self._lie = lie
        self._changed.set()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[str]:
        """Listen on loopback; gives the address."""
        app = web.Application()
        app.router.add_put("/liar", self._start)
        app.router.add_delete("/liar", self._stop)
        app.router.add_route("*", "/{tail:.*}", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        patient = ClientTimeout(total=None)
        async with ClientSession(timeout=patient, connector=TCPConnector(limit=0)) as self._session:
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", port)
                await site.start()
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
            finally:
                self.lie(None)
                await runner.cleanup()

    async def _start(self, request: web.Request) -> web.Response:
        self.lie(msgspec.json.decode(await request.read(), type=Lie))
        return web.Response()

    async def _stop(self, request: web.Request) -> web.Response:
        self.lie(None)
        return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        truth = asyncio.create_task(self._forward(request), name="forward")
        try:
            while not (lie := self._matching(request)):
                changed = asyncio.create_task(self._changed.wait(), name="changed")
                await asyncio.wait((truth, changed), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if truth.done():
                    return await truth
            self.told += 1
            return await self._tell(lie, request)
        finally:
            truth.cancel()

    def _matching(self, request: web.Request) -> Lie | None:
        lie = self._lie
        if lie is None or not request.path.startswith(lie.path):
            return None
        return lie if lie.consistent or "consistent" not in request.query else None

    async def _forward(self, request: web.Request, *, blocking: bool = True) -> web.Response:
        assert self._session is not None
        query = [(k, v) for k, v in request.query.items() if blocking or k not in ("index", "wait")]
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", *HOPS)}
        url, body = self._upstream + request.path, await request.read()
        try:
            async with self._session.request(
                request.method, url, params=query, headers=headers, data=body
            ) as answer:
                kept = CIMultiDict((k, v) for k, v in answer.headers.items() if k.lower() not in HOPS)
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
        except ClientError as error:
            return web.Response(status=502, text=str(error))

    async def _tell(self, lie: Lie, request: web.Request) -> web.StreamResponse:
        nothing = b"[]" if request.path.startswith("/v1/health/") else b"{}"
        headers = {"X-Consul-Index": "7", "X-Consul-KnownLeader": "true", "Content-Type": "application/json"}
        match lie.kind:
            case Kind.EMPTY:
                return web.Response(body=nothing, headers=headers)
            case Kind.FILTERED:
                return web.Response(
                    body=nothing, headers=headers | {"X-Consul-Results-Filtered-By-ACLs": "true"}
                )
            case Kind.LEADERLESS:
                return web.Response(body=nothing, headers=headers | {"X-Consul-KnownLeader": "false"})
            case Kind.NONSENSE:
                return web.Response(body=b'[{"Node": 1}]', headers=headers)
            case Kind.TOO_MANY:
                return web.Response(status=429, text="Your IP is issuing too many concurrent connections")
            case Kind.ERROR:
                return web.Response(status=500, text="rpc error making call: No cluster leader")
            case Kind.HANG:
                await self._changed.wait()
            case Kind.BACKWARDS:
                truth = await self._forward(request, blocking=False)
                truth.headers["X-Consul-Index"] = "1"
                return truth
            case Kind.TRUNCATED | Kind.DRIP:
                await self._drip(lie, request)
            case Kind.RESET:
                pass
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _drip(self, lie: Lie, request: web.Request) -> None:
        truth = await self._forward(request, blocking=False)
        assert isinstance(truth.body, bytes)
        response = web.StreamResponse(headers=truth.headers)
        response.content_length = len(truth.body)
        await response.prepare(request)
        if lie.kind is Kind.TRUNCATED:
            await response.write(truth.body[: len(truth.body) // 2])
            return
        for byte in truth.body:
            await response.write(bytes([byte]))
            await asyncio.sleep(DRIP_S)


async def main(port: int, upstream: str) -> None:
    async with Liar(upstream).serving(port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
