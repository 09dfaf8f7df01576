"""The web server that runs on backends: `python -m tests.world.web NAME PORT`.

GET /                          the server's name
GET /download?rate=R           R bytes a second until PUT /release, 256 KiB at once, then their SHA-256 in hex
POST /upload                   the SHA-256 in hex of what was sent
GET /health                    what the check asks for; PUT /health?status=429 changes the answer
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from dataclasses import dataclass

from aiohttp import web

TICK_S = 0.1
LAST_BYTES = 256 << 10  # more than goes out unanswered: the way from the client to here must still work


@dataclass
class Downloads:
    """`released` is of those that are under way; the next ones get another."""

    released: asyncio.Event


NAME = web.AppKey("name", str)
HEALTH = web.AppKey("health", dict[str, int])
DOWNLOADS = web.AppKey("downloads", Downloads)


def content(start: int, size: int) -> bytes:
    """Bytes that differ by where they are, so that a lost or doubled part shows."""
    return hashlib.shake_128(start.to_bytes(8, "big")).digest(size)


async def download(request: web.Request) -> web.StreamResponse:
    """Without a length: only the checksum at its end tells that all of it came."""
    rate = int(request.query["rate"])
    released = request.app[DOWNLOADS].released
    response = web.StreamResponse(headers={"X-Server": request.app[NAME]})
    await response.prepare(request)
    digest, sent = hashlib.sha256(), 0
    while not released.is_set():
        part = content(sent, int(rate * TICK_S))
        digest.update(part)
        sent += len(part)
        await response.write(part)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                await released.wait()
    part = content(sent, LAST_BYTES)
    digest.update(part)
    await response.write(part + digest.hexdigest().encode())
    await response.write_eof()
    return response


async def release(request: web.Request) -> web.Response:
    request.app[DOWNLOADS].released.set()
    request.app[DOWNLOADS].released = asyncio.Event()
    return web.Response(text="ok")


async def upload(request: web.Request) -> web.Response:
    digest = hashlib.sha256()
    async for part in request.content.iter_any():
        digest.update(part)
    return web.Response(text=digest.hexdigest(), headers={"X-Server": request.app[NAME]})


async def index(request: web.Request) -> web.Response:
    return web.Response(text=request.app[NAME], headers={"X-Server": request.app[NAME]})


async def health(request: web.Request) -> web.Response:
    if request.method == "PUT":
        request.app[HEALTH]["status"] = int(request.query["status"])
        return web.Response(text="ok")
    return web.Response(status=request.app[HEALTH]["status"])


def app(name: str) -> web.Application:
    made = web.Application(client_max_size=1 << 30)
    made[NAME] = name
    made[DOWNLOADS] = Downloads(asyncio.Event())
    made[HEALTH] = {"status": 200}
    made.add_routes(
        [
            web.get("/", index),
            web.get("/download", download),
            web.put("/release", release),
            web.post("/upload", upload),
            web.get("/health", health),
            web.put("/health", health),
        ]
    )
    return made


if __name__ == "__main__":
    web.run_app(app(sys.argv[1]), host="0.0.0.0", port=int(sys.argv[2]), print=None, access_log=None)
