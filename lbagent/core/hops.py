"""Which way packets to a real go: its route, the neighbour on that route and the device, put together.

Owns the decision and what was last told of it; lbagent.links feeds it from netlink and does what it asks
for: look up routes, let the kernel resolve neighbours. Time comes in as an argument.
"""

from __future__ import annotations

import enum
import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import NamedTuple

from lbagent.core.model import Hop

REVALIDATE_S = 5.0  # packets sent by XDP do not tell the kernel that a neighbour is in use; we do
RETRY_S = (1.0, 10.0)  # first and longest wait between two tries to resolve a neighbour
MTU_MAX = 0xFFFF  # struct hop keeps 16 bits, as an IPv4 packet's length does


class Nud(enum.IntFlag):
    """State of a neighbour entry, as in linux/neighbour.h."""

    NONE = 0
    INCOMPLETE = 0x01
    REACHABLE = 0x02
    STALE = 0x04
    DELAY = 0x08
    PROBE = 0x10
    FAILED = 0x20
    NOARP = 0x40
    PERMANENT = 0x80


USABLE = Nud.REACHABLE | Nud.STALE | Nud.DELAY | Nud.PROBE | Nud.PERMANENT | Nud.NOARP
FIXED = Nud.PERMANENT | Nud.NOARP  # the kernel never probes these, and asking would unfix them


class NeighbourKey(NamedTuple):
    """address: the gateway (of IPv6 in a route of RFC 5549), or the real itself."""

    ifindex: int
    address: IPv4Address | IPv6Address


class Neighbour(NamedTuple):
    """mac: None when packets cannot be sent to it."""

    state: Nud
    mac: bytes | None


class Route(NamedTuple):
    """mtu: what the route says, or the path MTU learnt; 0: the device's."""

    to: NeighbourKey
    mtu: int


class Device(NamedTuple):
    """An Ethernet device that is up and has carrier. Others are not in the table."""

    mac: bytes
    mtu: int


class Hops:
    """The hop of every wanted address.

    After each change: answer `unrouted` with `routed`, then `changes` is what is news, and `due` the
    neighbours to resolve. A neighbour that was known keeps its MAC while the kernel asks for it again, until
    that has failed.
    """

    def __init__(self) -> None:
        self._wanted: list[IPv4Address] = []  # sorted
        self._routes: dict[IPv4Address, Route] = {}
        self._users: dict[NeighbourKey, set[IPv4Address]] = {}
        self._neighbours: dict[NeighbourKey, Neighbour] = {}
        self._devices: dict[int, Device] = {}
        self._unrouted: set[IPv4Address] = set()
        self._dirty: set[IPv4Address] = set()
        self._told: dict[IPv4Address, Hop | None] = {}
        self._just_failed: dict[NeighbourKey, bytes] = {}  # and not yet told: the MACs they had
        self._asks: dict[NeighbourKey, tuple[int, float]] = {}  # serial, wait_s
        self._queue: list[tuple[float, int, NeighbourKey]] = []  # heap; entries whose serial is old are void
        self._serial = 0

    # ---- what is fed in -------------------------------------------------------------------------

    def want(self, addresses: Iterable[IPv4Address]) -> None:
        """From now on these, and no others."""
        before, now = set(self._wanted), set(addresses)
        for address in before - now:
            self._unroute(address)
            self._told.pop(address, None)
        self._unrouted = (self._unrouted & now) | (now - before)
        self._dirty &= now
        self._wanted = sorted(now)

    def reroute(self, network: IPv4Network) -> None:
        """Routes to this network may have changed."""
        start = bisect_left(self._wanted, network.network_address)
        stop = bisect_right(self._wanted, network.broadcast_address)
        self._unrouted.update(self._wanted[start:stop])

    def reroute_all(self) -> None:
        self._unrouted.update(self._wanted)

    def routed(self, address: IPv4Address, route: Route | None) -> None:
        """The kernel's answer; None: unreachable, or not by a plain unicast route."""
        old = self._routes.get(address)
        if route is None:
            self._unroute(address)
        else:
            self._routes[address] = route
            if route.to not in self._users:
                self._users[route.to] = set()
                self._ask_now(route.to)
            self._users[route.to].add(address)
            if old is not None and old.to != route.to:
                self._leave(address, old.to)
        if route != old or address not in self._told:
            self._dirty.add(address)

    def device(self, ifindex: int, device: Device | None) -> None:
        """None: gone, down, without carrier, or not Ethernet."""
        old = self._devices.get(ifindex)
        if device == old:
            return
        keys = [key for key in self._users if key.ifindex == ifindex]
        if device is None:
            del self._devices[ifindex]
            for key in [key for key in self._neighbours if key.ifindex == ifindex]:
                del self._neighbours[key]
        else:
            self._devices[ifindex] = device
            if old is None:
                for key in keys:
                    self._ask_now(key)
        if device is None or old is None:
            self.reroute_all()  # the kernel drops and revives routes with their device, and tells nobody
        for key in keys:
            self._dirty |= self._users[key]

    def devices(self, table: Mapping[int, Device]) -> None:
        """The whole table, read anew."""
        for ifindex in self._devices.keys() - table.keys():
            self.device(ifindex, None)
        for ifindex, device in table.items():
            self.device(ifindex, device)

    def neighbour(self, key: NeighbourKey, state: Nud, mac: bytes | None) -> None:
        """mac: as the kernel tells it, None if it does not."""
        old = self._mac(key)
        self._just_failed.pop(key, None)
        if state is Nud.FAILED:
            mac = None
            if old is not None:
                self._just_failed[key] = old
        elif not state & USABLE:
            mac = old
        self._neighbours[key] = Neighbour(state, mac)
        if mac != old and key in self._users:
            self._dirty |= self._users[key]
            if mac is None:
                self._ask_now(key)

    def forget_neighbour(self, key: NeighbourKey) -> None:
        """The kernel has no entry any more, which does not mean that nobody answers.

        One that is flushed by hand is said to have failed, then to be gone, in one breath.
        """
        mac = self._mac(key) or self._just_failed.pop(key, None)
        if key in self._users and mac is not None:
            self._neighbours[key] = Neighbour(Nud.NONE, mac)
            self._ask_now(key)
        else:
            self._neighbours.pop(key, None)

    def neighbours(self, table: Mapping[NeighbourKey, Neighbour]) -> None:
        """The whole table, read anew."""
        for key in self._neighbours.keys() - table.keys():
            self.forget_neighbour(key)
        for key, (state, mac) in table.items():
            self.neighbour(key, state, mac)

    # ---- what is to be done ---------------------------------------------------------------------

    def unrouted(self) -> tuple[IPv4Address, ...]:
        """Addresses whose route must be looked up now."""
        taken = tuple(self._unrouted)
        self._unrouted.clear()
        return taken

    def changes(self) -> dict[IPv4Address, Hop | None]:
        """What differs from what was last told, and what was never told."""
        found: dict[IPv4Address, Hop | None] = {}
        for address in self._dirty:
            hop = self._hop(address)
            if address not in self._told or hop != self._told[address]:
                found[address] = self._told[address] = hop
        self._dirty.clear()
        self._just_failed.clear()
        return found

    def due(self, now_s: float) -> list[NeighbourKey]:
        """Neighbours whose resolution is to be triggered now."""
        keys: list[NeighbourKey] = []
        while self._queue and self._queue[0][0] <= now_s:
            _, serial, key = heapq.heappop(self._queue)
            if self._asks.get(key, (0, 0.0))[0] != serial:
                continue
            state = self._state(key)
            wait_s = self._asks[key][1]
            if state & USABLE:
                self._ask(key, now_s + REVALIDATE_S, RETRY_S[0])
            else:
                self._ask(key, now_s + wait_s, min(wait_s * 2, RETRY_S[1]))
            if key.ifindex in self._devices and not state & FIXED:
                keys.append(key)
        return keys

    def next_due_s(self) -> float | None:
        """When `due` may have something; None: never, as things are."""
        return self._queue[0][0] if self._queue else None

    # ---- inside ---------------------------------------------------------------------------------

    def _hop(self, address: IPv4Address) -> Hop | None:
        route = self._routes.get(address)
        if route is None:
            return None
        device, mac = self._devices.get(route.to.ifindex), self._mac(route.to)
        if device is None or mac is None:
            return None
        mtu = min(route.mtu or device.mtu, device.mtu, MTU_MAX)
        return Hop(mac, device.mac, route.to.ifindex, mtu)

    def _mac(self, key: NeighbourKey) -> bytes | None:
        return self._neighbours[key].mac if key in self._neighbours else None

    def _state(self, key: NeighbourKey) -> Nud:
        return self._neighbours[key].state if key in self._neighbours else Nud.NONE

    def _unroute(self, address: IPv4Address) -> None:
        route = self._routes.pop(address, None)
        if route is not None:
            self._leave(address, route.to)

    def _leave(self, address: IPv4Address, key: NeighbourKey) -> None:
        users = self._users[key]
        users.discard(address)
        if not users:
            del self._users[key], self._asks[key]
            if self._state(key) is Nud.NONE:
                self._neighbours.pop(key, None)

    def _ask_now(self, key: NeighbourKey) -> None:
        self._ask(key, 0.0, RETRY_S[0])

    def _ask(self, key: NeighbourKey, at_s: float, wait_s: float) -> None:
        self._serial += 1
        self._asks[key] = (self._serial, wait_s)
        heapq.heappush(self._queue, (at_s, self._serial, key))
