"""systemd's notification protocol, sd_notify(3): one datagram of KEY=value lines, if systemd asked for it."""

from __future__ import annotations

import asyncio
import os
import socket

import structlog

SEND_S = 1.0  # systemd reads at once; a full queue must not hold up the agent

log = structlog.get_logger()


def notify(state: str) -> bool:
    """Tell the service manager, e.g. "READY=1". False: there is none, or it did not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(SEND_S)
            manager.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd_not_reached", state=state, why=str(error))
        return False
    return True


def watchdog_s() -> float | None:
    """How long systemd lets this process be silent; None: for ever."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 1e6


async def watchdog() -> None:
    """Say that the event loop is alive, three times in each watchdog period. Ends at once if nobody asked."""
    period_s = watchdog_s()
    while period_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_s / 3)
