"""The API's answers as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

HEAD = ("  backend", "address", "standing", "weight", "slots", "former", "records", "packets", "next hop")
RIGHT = range(3, 8)  # columns of numbers


def status_text(status: Any, now: float) -> str:
    """status: of GET /v1/status. now: Unix time."""
    return "\n".join(_status(status, now))


def backend_text(backend: Any) -> str:
    """backend: the answer to a drain or undrain."""
    return "\n".join(_told(backend))


def _status(status: Any, now: float) -> Iterator[str]:
    devices = ", ".join(f"{d['name']} ({d['mode']})" for d in status["devices"]) or "no device"
    ready = "ready" if status["ready"] else "NOT READY"
    start = "adopted" if status["adopted"] else "started"
    yield f"lbagent {status['version']}, {ready}, program {status['program']} on {devices}"
    yield (
        f"{start} {_ago(status['started_at'], now)}, last change {_ago(status['applied_at'], now)}, "
        f"Consul answered {_ago(status['consul_answer_at'], now)}"
    )
    drops = ", ".join(f"{count} {reason}" for reason, count in status["drops"].items() if count)
    yield f"flow records: {status['flow_records']}; drops: {drops or 'none'}"
    yield from _problems(status, "")
    if not status["services"]:
        yield "no services"
    rows = [row for service in status["services"] for row in _rows(service)]
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(len(HEAD))]
    for service in status["services"]:
        yield ""
        yield from _service(service, widths, now)


def _service(service: Any, widths: Sequence[int], now: float) -> Iterator[str]:
    vips = ", ".join(f"{v['address']}:{v['port']}/{v['proto']}" for v in service["vips"]) or "no VIP"
    state = "" if service["serving"] else ", NOT SERVING"
    ring = f"ring {service['ring_size']} {service['ring_digest']}" if service["ring_size"] else "no ring"
    yield f"{service['name']}  {vips}{state}, {ring}, Consul answered {_ago(service['answer_at'], now)}"
    yield from _problems(service, "  ")
    if not service["backends"]:
        yield "  no backends"
        return
    yield _line(HEAD, widths)
    for backend, row in zip(service["backends"], _rows(service), strict=True):
        yield _line(row, widths)
        if backend["reason"]:
            yield f"    reason: {backend['reason']}"
        yield from _problems(backend, "    ")


def _rows(service: Any) -> list[tuple[str, ...]]:
    return [
        (
            f"  {_name(b)}",
            f"{b['address']}:{b['port']}",
            b["standing"] + (" (empty)" if b["empty"] else ""),
            *(str(b[key]) for key in ("weight", "slots", "former_slots", "records", "packets")),
            b["hop"] or "unknown",
        )
        for b in service["backends"]
    ]


def _told(backend: Any) -> Iterator[str]:
    why = f' ("{backend["reason"]}")' if backend["reason"] else ""
    yield f"{backend['service']} {_name(backend)} is {backend['standing']}{why}"
    if backend["empty"]:
        yield "it is empty: no connection is left on it"
    elif backend["slots"]:
        yield f"it gets new connections: {backend['slots']} slots"
    else:
        yield (
            f"not empty yet: {backend['records']} connections recorded, "
            f"{backend['former_slots']} former slots have not settled"
        )
    if backend.get("ended") == "stopping":
        yield "the agent stopped or read its configuration again meanwhile; the drain is kept: ask again"
    yield from _problems(backend, "")


def _name(backend: Any) -> str:
    return f"{backend['node']}/{backend['id']}" if backend["id"] else "(not known to Consul)"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        text.rjust(width) if column in RIGHT else text.ljust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _problems(of: Any, indent: str) -> Iterator[str]:
    for problem in of["problems"]:
        yield f"{indent}! {problem}"


def _ago(at: float, now: float) -> str:
    if not at:
        return "never"
    seconds = max(0, round(now - at))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"
