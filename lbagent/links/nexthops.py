"""Keeps the way to each real current from netlink's events. What those mean is decided in core/hops.py."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, ip_address

import structlog
from pyroute2.netlink import nlmsg, rtnl
from pyroute2.netlink.rtnl.ifinfmsg import IFF_RUNNING, IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import NTF_USE, ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from lbagent.core.hops import Device, Hops, Neighbour, NeighbourKey, Nud, Route
from lbagent.core.model import Hop
from lbagent.links.netlink import (
    HEADER,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Netlink,
    attributes,
    decode,
    encode,
)

REREAD_S = 60.0  # netlink tells no learnt path MTU, nor that one expired

# linux/rtnetlink.h, linux/if_arp.h
RTNLGRP_NEXTHOP = 32
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
RTM_SIZE, RTM_TYPE = 12, 7  # struct rtmsg, and rtm_type in it
RTN_UNICAST = 1
RTA_OIF, RTA_GATEWAY, RTA_METRICS, RTA_VIA = 4, 5, 8, 18
RTAX_MTU = 2
ARPHRD_ETHER = 1

log = structlog.get_logger()

EVENTS = (
    rtnl.RTNLGRP_LINK,
    rtnl.RTNLGRP_NEIGH,
    rtnl.RTNLGRP_IPV4_IFADDR,
    rtnl.RTNLGRP_IPV4_ROUTE,
    rtnl.RTNLGRP_IPV4_RULE,
    RTNLGRP_NEXTHOP,
)


class NextHops:
    """Keeps the hop of each wanted address current, on a thread of its own.

    Callbacks come from that thread. After an unforeseen error the thread ends and `on_error` has it; hops
    told before are then no longer kept.
    """

    def __init__(self) -> None:
        self._hops = Hops()
        self._wanted: frozenset[IPv4Address] | None = None  # handed over under the lock
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(
        self,
        on_change: Callable[[Mapping[IPv4Address, Hop | None]], None],
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Works in the network namespace of the calling thread. on_change: only addresses that changed, and
        each newly wanted one once, None while its way is not known."""
        self._thread = threading.Thread(
            target=self._run, args=(on_change, on_error), name="nexthops", daemon=True
        )
        self._thread.start()

    def want(self, addresses: Iterable[IPv4Address]) -> None:
        """From now on these, and no others."""
        with self._lock:
            self._wanted = frozenset(addresses)
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """No callback comes after this has returned. It cannot be started again."""
        if self._thread is not None:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
            os.close(self._wake)

    def _run(
        self,
        on_change: Callable[[Mapping[IPv4Address, Hop | None]], None],
        on_error: Callable[[BaseException], None] | None,
    ) -> None:
        try:
            with Netlink(EVENTS) as events, Netlink() as netlink:
                self._follow(events, netlink, on_change)
        except Exception as error:
            log.critical("nexthops_ended", why=repr(error))
            if on_error is None:
                raise
            on_error(error)

    def _follow(
        self,
        events: Netlink,
        netlink: Netlink,
        on_change: Callable[[Mapping[IPv4Address, Hop | None]], None],
    ) -> None:
        poll = select.poll()
        poll.register(events, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        reread_s = 0.0
        while True:
            if time.monotonic() >= reread_s:
                self._read_all(netlink)
                reread_s = time.monotonic() + REREAD_S
            self._take_wanted()
            if self._stopping:
                return
            self._look_up_routes(netlink)
            if changed := self._hops.changes():
                on_change(changed)
            netlink.tell([_use(key) for key in self._hops.due(time.monotonic())])
            due_s = min(reread_s, self._hops.next_due_s() or reread_s)
            poll.poll(max(0.0, due_s - time.monotonic()) * 1000 + 1)
            try:
                for type_, message in events.pending():
                    self._event(type_, message)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                log.warning("netlink_events_lost", remedy="reading everything again")
                reread_s = 0.0

    def _take_wanted(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self._hops.want(wanted)

    def _read_all(self, netlink: Netlink) -> None:
        self._hops.devices(
            {
                link["index"]: device
                for link in netlink.ask(ifinfmsg(), rtnl.RTM_GETLINK, NLM_F_DUMP)
                if (device := _device(link)) is not None
            }
        )
        found: dict[NeighbourKey, Neighbour] = {}
        for message in netlink.ask(ndmsg(), rtnl.RTM_GETNEIGH, NLM_F_DUMP):
            if (neighbour := _neighbour(message)) is not None:
                found[neighbour[0]] = neighbour[1]
        self._hops.neighbours(found)
        self._hops.reroute_all()

    def _look_up_routes(self, netlink: Netlink) -> None:
        asked = self._hops.unrouted()
        answers = netlink.ask_each([_ROUTE_TO + address.packed for address in asked])
        for address, answer in zip(asked, answers, strict=True):
            self._hops.routed(address, _route(address, answer))

    def _event(self, type_: int, content: bytes) -> None:
        family = content[HEADER.size]
        if type_ in (rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH) and family in (socket.AF_INET, socket.AF_INET6):
            neighbour = _neighbour(decode(type_, content))
            if neighbour is not None and type_ == rtnl.RTM_NEWNEIGH:
                self._hops.neighbour(neighbour[0], *neighbour[1])
            elif neighbour is not None:
                self._hops.forget_neighbour(neighbour[0])
        elif type_ in (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK) and family == socket.AF_UNSPEC:
            link = decode(type_, content)
            self._hops.device(link["index"], _device(link) if type_ == rtnl.RTM_NEWLINK else None)
        elif type_ in (rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE) and family == socket.AF_INET:
            route = decode(type_, content)
            network = f"{route.get_attr('RTA_DST') or '0.0.0.0'}/{route['dst_len']}"
            self._hops.reroute(IPv4Network(network, strict=False))
        elif type_ in _REROUTE and family in (socket.AF_INET, socket.AF_UNSPEC):
            self._hops.reroute_all()


_REROUTE = (
    rtnl.RTM_NEWADDR,
    rtnl.RTM_DELADDR,
    rtnl.RTM_NEWRULE,
    rtnl.RTM_DELRULE,
    RTM_NEWNEXTHOP,
    RTM_DELNEXTHOP,
)


def _route_request() -> bytes:
    """A request for the route to an address, whose four bytes are to be appended."""
    request = rtmsg()
    request["family"], request["dst_len"] = socket.AF_INET, 32
    request["attrs"] = [("RTA_DST", "0.0.0.0")]
    return encode(request, rtnl.RTM_GETROUTE, NLM_F_REQUEST)[:-4]


_ROUTE_TO = _route_request()  # encoding one takes longer than the kernel's answer


def _route(address: IPv4Address, answer: bytes | None) -> Route | None:
    if answer is None or answer[HEADER.size + RTM_TYPE] != RTN_UNICAST:
        return None
    told = attributes(answer, HEADER.size + RTM_SIZE)
    gateway = told.get(RTA_GATEWAY) or told.get(RTA_VIA, b"")[2:]  # struct rtvia: family, address
    mtu = attributes(told.get(RTA_METRICS, b""), 0).get(RTAX_MTU, b"")
    key = NeighbourKey(_number(told[RTA_OIF]), ip_address(gateway) if gateway else address)
    return Route(key, _number(mtu))


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, sys.byteorder)


def _device(link: nlmsg) -> Device | None:
    usable = IFF_UP | IFF_RUNNING
    if link["ifi_type"] != ARPHRD_ETHER or link["flags"] & usable != usable:
        return None
    return Device(_mac(link.get_attr("IFLA_ADDRESS")), link.get_attr("IFLA_MTU"))


def _neighbour(message: nlmsg) -> tuple[NeighbourKey, Neighbour] | None:
    address, mac = message.get_attr("NDA_DST"), message.get_attr("NDA_LLADDR")
    if address is None or message["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None  # a bridge's
    key = NeighbourKey(message["ifindex"], ip_address(address))
    return key, Neighbour(Nud(message["state"]), _mac(mac) if mac and len(mac) == 17 else None)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _use(key: NeighbourKey) -> bytes:
    """Have the kernel treat the neighbour as one that is being sent to: resolve it, or see if it is there."""
    request = ndmsg()
    request["family"] = socket.AF_INET if key.address.version == 4 else socket.AF_INET6
    request["ifindex"], request["flags"] = key.ifindex, NTF_USE
    request["attrs"] = [("NDA_DST", str(key.address))]
    return encode(request, rtnl.RTM_NEWNEIGH, NLM_F_REQUEST | NLM_F_CREATE)
