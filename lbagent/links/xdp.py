"""XDP programs on devices: attach, replace without a gap, take off. Foreign programs are left alone."""

from __future__ import annotations

import errno
from collections.abc import Callable

import structlog
from pyroute2.netlink import nlmsg, rtnl
from pyroute2.netlink.rtnl.ifinfmsg import (
    XDP_FLAGS_DRV_MODE,
    XDP_FLAGS_SKB_MODE,
    XDP_FLAGS_UPDATE_IF_NOEXIST,
    ifinfmsg,
)

from lbagent.errors import LinkError
from lbagent.links.netlink import Netlink, index_of

MODES = {"xdp": "native", "xdpgeneric": "generic", "xdpoffload": "offload", "xdpmulti": "several"}

log = structlog.get_logger()


def _nobodys(_: int) -> bool:
    return False


def attach(device: str, prog_fd: int, mode: str = "auto", ours: Callable[[int], bool] = _nobodys) -> str:
    """Attach a program, or put it in the place of one of ours, without a packet in between.

    mode: native, generic, or auto: native if the driver can. ours: tells by its id whether a program that
    is attached may be replaced. Returns the mode it runs in. Raises LinkError.
    """
    index = index_of(device)
    now = attached(device)
    if now is not None and not ours(now[1]):
        raise LinkError(
            f"{device} already has an XDP program that is not lbagent's: id {now[1]}, {now[0]} mode"
            f" (see `bpftool prog show id {now[1]}`; `ip link set dev {device} xdp off` removes it)"
        )
    if now is not None and mode in ("auto", now[0]):
        _set_xdp(device, index, prog_fd, now[0], now[1])  # the same mode: the only way to swap without a gap
        _warn_of_generic(device, now[0], "as before")
        return now[0]
    if now is not None:
        return _change_mode(device, index, prog_fd, mode, now)
    if mode != "generic":
        try:
            _set_xdp(device, index, prog_fd, "native")
        except LinkError as error:
            if mode == "native" or getattr(error.__cause__, "errno", 0) in (
                errno.EPERM,
                errno.EEXIST,
                errno.EBUSY,
            ):
                raise
            _set_xdp(device, index, prog_fd, "generic")
            _warn_of_generic(device, "generic", str(error))
            return "generic"
        return "native"
    _set_xdp(device, index, prog_fd, "generic")
    _warn_of_generic(device, "generic", "as configured")
    return "generic"


def attached(device: str) -> tuple[str, int] | None:
    """Mode and id of the program on the device."""
    with Netlink() as netlink:
        xdp = _link(netlink, index_of(device)).get_attr("IFLA_XDP")
    kind = xdp.get_attr("IFLA_XDP_ATTACHED") if xdp is not None else None
    if kind is None:
        return None
    ids = [xdp.get_attr(f"IFLA_XDP_{which}PROG_ID") for which in ("", "DRV_", "SKB_", "HW_")]
    return MODES[kind], next((int(number) for number in ids if number), 0)


def detach(device: str) -> None:
    """Take off whatever program is there: the caller knows whose it is."""
    now = attached(device)
    if now is not None:
        _set_xdp(device, index_of(device), -1, now[0], now[1])


def _change_mode(device: str, index: int, prog_fd: int, mode: str, now: tuple[str, int]) -> str:
    """The kernel has no native and generic program at once, so packets pass us by for a moment."""
    log.warning("xdp_mode_changes", device=device, old=now[0], new=mode, cost="packets pass by for a moment")
    _set_xdp(device, index, -1, now[0], now[1])
    try:
        _set_xdp(device, index, prog_fd, mode)
    except LinkError:
        _set_xdp(device, index, prog_fd, now[0])
        raise
    _warn_of_generic(device, mode, "as configured")
    return mode


def _set_xdp(device: str, index: int, prog_fd: int, mode: str, replaced: int = 0) -> None:
    """prog_fd -1 detaches. Without `replaced`, a program that came in between is left alone."""
    flags = XDP_FLAGS_DRV_MODE if mode == "native" else XDP_FLAGS_SKB_MODE
    if not replaced:
        flags |= XDP_FLAGS_UPDATE_IF_NOEXIST
    request = ifinfmsg()
    request["index"] = index
    request["attrs"] = [("IFLA_XDP", {"attrs": [("IFLA_XDP_FD", prog_fd), ("IFLA_XDP_FLAGS", flags)]})]
    try:
        with Netlink() as netlink:
            netlink.ask(request, rtnl.RTM_SETLINK)
    except OSError as error:
        verb = "attach" if prog_fd >= 0 else "detach"
        raise LinkError(
            f"{device}: cannot {verb} an XDP program in {mode} mode: {error.strerror or error}"
        ) from error


def _warn_of_generic(device: str, mode: str, why: str) -> None:
    if mode == "generic":
        cost = "each packet becomes an skb first: several times the CPU time per packet"
        log.warning("xdp_generic_mode", device=device, why=why, cost=cost)


def _link(netlink: Netlink, index: int) -> nlmsg:
    request = ifinfmsg()
    request["index"] = index
    return netlink.ask(request, rtnl.RTM_GETLINK)[0]
