"""Clients: `python -m tests.world.traffic WHAT URL ...`, run inside the client's namespace.

    get URL                 --count N short requests, for people: who answered how many
    requests URL            --count N short requests, each on a connection of its own
    steady URL              --rate R of them a second until SIGTERM
    downloads URL           --count N slow downloads at once, which end when the server says so, checked
                            by their checksum
    upload URL              --count N uploads of --bytes N, and the path MTU that they learned

Each prints one JSON object for each thing that happened (see `Event`). Times are of CLOCK_MONOTONIC,
so that the one who started this can compare them with his own.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from tests.world.net import Host
from tests.world.procs import Proc, Procs, until

REQUEST_S = 5.0  # patience for an answer to a short request
SILENCE_S = 15.0  # patience for the next bytes of a long one


@dataclass(frozen=True, slots=True)
class Event:
    """kind: "request" (over), "begin" (a download's head is here), "end". error: "" if all went well."""

    kind: str
    start: float
    end: float = 0.0
    server: str = ""
    error: str = ""
    mtu: int = 0


class BadAnswer(Exception):
    """The connection did not break, but what it brought is not what was sent."""


# ---- the client's process -----------------------------------------------------------------------


def tell(event: Event) -> None:
    print(json.dumps(asdict(event)), flush=True)


async def fetch(
    url: str, upload: bytes = b"", on_head: Callable[[str], None] = lambda server: None
) -> tuple[bytes, int]:
    """One request on a connection of its own: its whole body, and the path MTU that the connection knows."""
    at = urlsplit(url)
    patience_s = SILENCE_S if upload or at.query else REQUEST_S
    async with asyncio.timeout(REQUEST_S):
        reader, writer = await asyncio.open_connection(at.hostname, at.port or 80)
    try:
        path = at.path + (f"?{at.query}" if at.query else "")
        head = f"{'POST' if upload else 'GET'} {path} HTTP/1.0\r\nHost: {at.netloc}\r\n"
        writer.write(f"{head}Content-Length: {len(upload)}\r\n\r\n".encode() + upload)
        async with asyncio.timeout(patience_s):
            await writer.drain()
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if " 200 " not in status + " ":
            raise BadAnswer(status)
        on_head(headers.get("x-server", ""))
        body = bytearray()
        while True:
            async with asyncio.timeout(patience_s):
                part = await reader.read(1 << 16)
            if not part:
                break
            body += part
        length = headers.get("content-length", str(len(body)))
        if len(body) != int(length):
            raise BadAnswer(f"{len(body)} of {length} bytes")
        mtu = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_IP, 14)  # IP_MTU
        return bytes(body), mtu
    finally:
        writer.close()


def reason(error: BaseException) -> str:
    match error:
        case TimeoutError():
            return "timed out"
        case asyncio.IncompleteReadError():
            return "closed before the answer"
        case _:
            return str(error) or type(error).__name__


async def request(url: str, tell: Callable[[Event], None] = tell) -> Event:
    start = time.monotonic()
    try:
        body, _ = await fetch(url)
        event = Event("request", start, time.monotonic(), body.decode())
    except (OSError, BadAnswer, asyncio.IncompleteReadError) as e:
        event = Event("request", start, time.monotonic(), error=reason(e))
    tell(event)
    return event


async def download(url: str) -> None:
    start = time.monotonic()
    server = ""

    def on_head(name: str) -> None:
        nonlocal server
        server = name
        tell(Event("begin", start, server=name))

    try:
        body, _ = await fetch(url, on_head=on_head)
        if hashlib.sha256(body[:-64]).hexdigest().encode() != body[-64:]:
            raise BadAnswer("checksum differs")
        tell(Event("end", start, time.monotonic(), server))
    except (OSError, BadAnswer, asyncio.IncompleteReadError) as e:
        tell(Event("end", start, time.monotonic(), server, reason(e)))


async def upload(url: str, size: int) -> None:
    start = time.monotonic()
    content = hashlib.shake_128(b"upload").digest(size)
    try:
        answer, mtu = await fetch(url, content)
        if answer.decode() != hashlib.sha256(content).hexdigest():
            raise BadAnswer("checksum differs")
        tell(Event("end", start, time.monotonic(), mtu=mtu))
    except (OSError, BadAnswer, asyncio.IncompleteReadError) as e:
        tell(Event("end", start, time.monotonic(), error=reason(e)))


async def get(url: str, count: int) -> None:
    events = [await request(url, tell=lambda event: None) for _ in range(count)]
    for answer, times in Counter(event.error or event.server for event in events).most_common():
        print(f"{times:5}  {answer}")


async def many(url: str, count: int, parallel: int) -> None:
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await request(url)

    async with asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(worker())


async def steady(url: str, rate: float) -> None:
    """Requests start on time, whether or not the ones before have ended."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    due = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while not stopped.is_set():
            group.create_task(request(url))
            due += 1 / rate
            try:
                async with asyncio.timeout(due - time.monotonic()):
                    await stopped.wait()
            except TimeoutError:
                continue


async def at_once(works: Iterable[Callable[[], object]], pace_s: float) -> None:
    """All at the same time, but begun `pace_s` apart."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work())  # type: ignore[arg-type]  # coroutines of any kind
            await asyncio.sleep(pace_s)


def main() -> None:
    parser = argparse.ArgumentParser(prog="traffic")
    parser.add_argument("what", choices=["get", "requests", "steady", "downloads", "upload"])
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--bytes", type=int, default=1 << 20)
    args = parser.parse_args()
    match args.what:
        case "get":
            asyncio.run(get(args.url, args.count))
        case "requests":
            asyncio.run(many(args.url, args.count, args.parallel))
        case "steady":
            asyncio.run(steady(args.url, args.rate))
        case "downloads":
            asyncio.run(at_once([lambda: download(args.url)] * args.count, 0.01))
        case "upload":
            asyncio.run(at_once([lambda: upload(args.url, args.bytes)] * args.count, 0.01))


# ---- the one who started it ---------------------------------------------------------------------


@dataclass(slots=True)
class Traffic:
    """A client's process, and what it told so far."""

    proc: Proc

    def events(self, kind: str = "request") -> list[Event]:
        text = self.proc.out.read_text()
        whole = text[: text.rfind("\n") + 1]  # a line may be half-written
        return [event for line in whole.splitlines() if (event := Event(**json.loads(line))).kind == kind]

    def until_begun(self, count: int) -> list[Event]:
        """Wait for that many downloads to be under way."""
        until(lambda: len(self.events("begin")) >= count, f"{count} downloads under way")
        return self.events("begin")

    def finish(self, patience_s: float = 60) -> None:
        """Wait for it to end by itself."""
        code = self.proc.wait(patience_s)
        assert code == 0, f"{self.proc.name} ended with {code}\n{self.proc.tail()}"

    def stop(self) -> None:
        """Let it end what it began."""
        code = self.proc.stop()
        assert code == 0, f"{self.proc.name} ended with {code}\n{self.proc.tail()}"


def start(procs: Procs, client: Host, what: str, url: str, **options: float) -> Traffic:
    """`options` are the command line's: start(..., "requests", url, count=300)."""
    name = f"{what}-{sum(proc.name.startswith(what) for proc in procs.all) + 1}"
    flags = (f"--{key}={value}" for key, value in options.items())
    python = (sys.executable, "-B", "-m", "tests.world.traffic")
    return Traffic(procs.start(client, name, *python, what, url, *flags))


def spread(events: Iterable[Event]) -> Counter[str]:
    """How many requests each server answered."""
    return Counter(event.server for event in events if not event.error)


def failed(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.error]


if __name__ == "__main__":
    main()
