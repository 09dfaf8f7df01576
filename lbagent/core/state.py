"""What is known of the world: events fold into one immutable `State`.

Owns memory: the last good options of each service, backends that went and when, what operators intend, next
hops, and what the kernel held at the start. What follows from it is core/desired.py's. All times are Unix
times that come in with the events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import assert_never

from lbagent.core.instances import Departed, Instance, Service, judge
from lbagent.core.model import UDP_STATELESS, UNNAMED, Hop, Live, RealState, VipKey, claimant
from lbagent.core.options import LONGEST_S, Options
from lbagent.core.status import Standing

# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServiceAnswered:
    """Consul's good answer: these are all opted-in instances of the service."""

    service: str
    instances: tuple[Instance, ...]
    at: float


@dataclass(frozen=True, slots=True)
class CatalogAnswered:
    """Consul's good answer: these are all services that have an opted-in instance."""

    services: frozenset[str]
    at: float


@dataclass(frozen=True, slots=True)
class ConsulFailed:
    """No answer that may be believed; service: None when it is the list of services."""

    service: str | None
    error: str
    at: float


@dataclass(frozen=True, slots=True)
class Drained:
    """An operator wants no new connections there, until further notice. since: Unix time."""

    service: str
    node: str
    id: str
    reason: str
    since: float


@dataclass(frozen=True, slots=True)
class Undrained:
    service: str
    node: str
    id: str


@dataclass(frozen=True, slots=True)
class IntentsLoaded:
    drains: tuple[Drained, ...]


@dataclass(frozen=True, slots=True)
class HopsChanged:
    """Next hops that are news; None: it is known that there is no way."""

    hops: Mapping[IPv4Address, Hop | None]


@dataclass(frozen=True, slots=True)
class Adopted:
    """What the kernel held when the agent started."""

    live: Live
    at: float


Event = (
    ServiceAnswered
    | CatalogAnswered
    | ConsulFailed
    | Drained
    | Undrained
    | IntentsLoaded
    | HopsChanged
    | Adopted
)


# ---- state --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Legacy:
    """What the kernel held for one service at the start: addresses that served, and the options that show."""

    addresses: frozenset[IPv4Address]
    options: Options


@dataclass(frozen=True, slots=True)
class State:
    """listed: None until Consul's first answer. legacy: by claimant, what no answer has replaced so far.

    full_at: when first the list and each service on it had been answered; 0: not yet.
    """

    services: Mapping[str, Service] = field(default_factory=dict)
    listed: frozenset[str] | None = None
    drains: Mapping[tuple[str, str, str], Drained] = field(default_factory=dict)
    hops: Mapping[IPv4Address, Hop | None] = field(default_factory=dict)
    legacy: Mapping[int, Legacy] = field(default_factory=dict)
    adopted_at: float = 0.0
    full_at: float = 0.0
    answer_at: float = 0.0  # of the list of services
    error: str = ""  # of Consul, since the last good list
    errors: int = 0


def fold(state: State, event: Event) -> State:
    """The state after the event."""
    match event:
        case ServiceAnswered():
            return _complete(_answered(state, event), event.at)
        case CatalogAnswered():
            listed = replace(state, listed=event.services, answer_at=event.at, error="")
            return _prune(_complete(listed, event.at), event.at)
        case ConsulFailed(name, error, _):
            if name is None:
                return replace(state, error=error, errors=state.errors + 1)
            service = replace(state.services.get(name, Service()), error=error)
            return replace(state, services={**state.services, name: service}, errors=state.errors + 1)
        case Drained():
            drains = {**state.drains, (event.service, event.node, event.id): event}
            return replace(state, drains=drains)
        case Undrained():
            gone = (event.service, event.node, event.id)
            return replace(state, drains={k: d for k, d in state.drains.items() if k != gone})
        case IntentsLoaded(loaded):
            return replace(state, drains={(d.service, d.node, d.id): d for d in loaded})
        case HopsChanged(hops):
            return replace(state, hops={**state.hops, **hops})
        case Adopted():
            return _adopted(state, event)
        case _:
            assert_never(event)


def _answered(state: State, event: ServiceAnswered) -> State:
    name, number = event.service, claimant(event.service)
    unnamed = unnamed_service(number)
    old = state.services.get(name) or state.services.get(unnamed) or Service()
    left = {**{a: Departed(i, event.at) for a, i in old.speakers.items()}, **old.departed}
    options = old.options
    if number in state.legacy:
        options = options or state.legacy[number].options
        left |= _left(state.legacy[number], event.at)
    new = judge(event.instances, options)
    departed = {a: d for a, d in left.items() if a not in new.speakers}
    services = {n: s for n, s in state.services.items() if n != unnamed}
    services[name] = replace(new, departed=departed, answer_at=event.at)
    return replace(state, services=services, legacy={c: v for c, v in state.legacy.items() if c != number})


def _adopted(state: State, event: Adopted) -> State:
    """Consul may have answered before: then those services' answers are taken again, with what was found."""
    state = replace(state, legacy=_legacy(event.live), adopted_at=event.at)
    for name, service in state.services.items():
        if service.answer_at:
            state = _answered(state, ServiceAnswered(name, service.instances, service.answer_at))
    return _complete(state, event.at)


def _complete(state: State, at: float) -> State:
    """Once the answers are full, whoever is left over from before has departed."""
    if state.listed is None or any(
        state.services.get(name, Service()).answer_at == 0 for name in state.listed
    ):
        return state
    left = {
        unnamed_service(number): Service(options=legacy.options, departed=_left(legacy, at))
        for number, legacy in state.legacy.items()
    }
    return replace(state, services={**state.services, **left}, legacy={}, full_at=state.full_at or at)


def _prune(state: State, now: float) -> State:
    """Forget what can matter no more: departed longer ago than any linger time, services and hops of none."""
    services: dict[str, Service] = {}
    for name, service in state.services.items():
        departed = {a: d for a, d in service.departed.items() if now - d.at <= LONGEST_S}
        if service.instances or departed or name in (state.listed or ()):
            services[name] = replace(service, departed=departed)
    known = {a for legacy in state.legacy.values() for a in legacy.addresses}
    for service in services.values():
        known |= service.speakers.keys() | service.departed.keys()
    return replace(state, services=services, hops={a: hop for a, hop in state.hops.items() if a in known})


# ---- what was there before ----------------------------------------------------------------------


def _legacy(live: Live) -> dict[int, Legacy]:
    keys: dict[int, list[VipKey]] = {}
    for key, vip in live.vips.items():
        keys.setdefault(vip.claimant, []).append(key)
    found: dict[int, Legacy] = {}
    for number, mine in keys.items():
        first = min(mine)
        vip = live.vips[first]
        serving = {
            r.address for r in live.reals.values() if r.vip == vip.number and r.state is RealState.SERVING
        }
        protos = tuple(sorted({key.proto for key in mine}))
        stateless = bool(vip.flags & UDP_STATELESS)
        options = Options(first.address, first.port, protos, ring_bits=vip.ring_bits, udp_stateless=stateless)
        found[number] = Legacy(frozenset(serving), options)
    return found


def unnamed_service(number: int) -> str:
    """Stands for the service that claimant `number` is of, while its name is not known."""
    return f"{UNNAMED}{number:016x}"


def _left(legacy: Legacy, at: float) -> dict[IPv4Address, Departed]:
    port = legacy.options.port
    return {
        a: Departed(Instance("", "", str(a), port, (), {}, 1, 1, Standing.PASSING), at)
        for a in legacy.addresses
    }
