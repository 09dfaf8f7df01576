"""What is known of the world becomes what is wanted in the kernel, and a view of it for operators.

Decides the duty of each backend and when what has departed is over. Who gets in where services are in each
other's way is core/admission.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

from lbagent.core.admission import Claim, Verdict, admit, live_numbers, live_reals
from lbagent.core.instances import Departed, Instance, Service
from lbagent.core.model import (
    RING_BITS,
    UDP_STATELESS,
    Backend,
    Duty,
    Hop,
    Live,
    LiveVip,
    Real,
    RealState,
    Snapshot,
    Vip,
    VipKey,
    claimant,
)
from lbagent.core.options import OnCritical, Options
from lbagent.core.ring import ring_bits
from lbagent.core.state import State, unnamed_service
from lbagent.core.status import Standing
from lbagent.errors import InconsistentSnapshot

HOP_GRACE_S = (
    10.0  # after the start, while neighbours get time to answer, the hop found in the kernel is used
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """For services that do not say."""

    settle_s: int = 300
    linger_s: int = 300


@dataclass(frozen=True, slots=True)
class BackendView:
    """An instance, or an address that only the kernel still knows (node and id "").

    backend: what is wanted, None if it is left out. reason, since: of the drain.
    """

    node: str
    id: str
    address: str
    port: int
    standing: Standing
    backend: Backend | None
    reason: str = ""
    since: float = 0.0
    problems: tuple[str, ...] = ()

    @property
    def weight(self) -> int:
        return self.backend.weight if self.backend is not None else 0


@dataclass(frozen=True, slots=True)
class ServiceView:
    """vip: what is wanted for it, None: it is not served. answer_at: Consul's last good answer, 0: never."""

    name: str
    vip: Vip | None
    backends: tuple[BackendView, ...]
    problems: tuple[str, ...] = ()
    answer_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Desired:
    """services: by name, all that something is known of. problems: those of no single service."""

    want: Snapshot
    services: tuple[ServiceView, ...]
    problems: tuple[str, ...] = ()


def desired(state: State, live: Live, defaults: Defaults, now: float) -> Desired:
    """What the kernel should hold. now: Unix time. The want always passes `check`."""
    world = _World(state, live, defaults, now)
    views = [*world.answered(), *world.held()]
    claims = [Claim(view.vip, _is_registered(view)) for view in views if view.vip is not None]
    verdicts = admit(claims, live)
    judged = sorted((_judged(view, verdicts.get(view.name)) for view in views), key=lambda view: view.name)
    want = Snapshot(tuple(view.vip for view in judged if view.vip is not None))
    return Desired(want, tuple(judged), _consul(state.error))


def check(snapshot: Snapshot) -> None:
    """Raise InconsistentSnapshot unless the snapshot keeps the promises of core/model.py."""
    seen: dict[VipKey, str] = {}
    names = [vip.service for vip in snapshot.vips]
    if len(set(names)) < len(names):
        raise InconsistentSnapshot("a service is wanted twice")
    for vip in snapshot.vips:
        if not vip.keys:
            raise InconsistentSnapshot(f"{vip.service} has no key")
        for key in vip.keys:
            if key in seen:
                raise InconsistentSnapshot(f"{key} is wanted by {seen[key]} and by {vip.service}")
            seen[key] = vip.service
        addresses = [int(backend.address) for backend in vip.backends]
        if addresses != sorted(set(addresses)):
            raise InconsistentSnapshot(f"{vip.service}: backends are not sorted, or not unique")
        if vip.ring_bits not in RING_BITS:
            raise InconsistentSnapshot(f"{vip.service}: no ring has 2^{vip.ring_bits} slots")
        if vip.settle_s < 1 or any(backend.weight < 0 for backend in vip.backends):
            raise InconsistentSnapshot(f"{vip.service}: a settle time or weight is out of range")


# ---- one service after the other ----------------------------------------------------------------


@dataclass(slots=True)
class _World:
    """All that a decision on one service looks at."""

    state: State
    live: Live
    defaults: Defaults
    now: float
    numbers: Mapping[int, int] = field(init=False)  # of VIPs, by claimant
    reals: Mapping[int, Mapping[IPv4Address, Real]] = field(init=False)  # in use, by VIP number

    def __post_init__(self) -> None:
        self.numbers = live_numbers(self.live)
        self.reals = live_reals(self.live)

    def answered(self) -> Iterator[ServiceView]:
        """Services as Consul told, or as it told last."""
        for name, service in self.state.services.items():
            if claimant(name) in self.state.legacy:
                continue
            backends, vip = tuple(_refused(service)), None
            if service.options is not None:
                wanted = tuple(self._backends(name, service, service.options))
                if service.speakers or any(
                    self._lingers(d, service.options) for d in service.departed.values()
                ):
                    vip = self._vip(name, service, service.options, wanted)
                backends = wanted + backends
            problems = _consul(service.error) + ((service.problem,) if service.problem else ())
            if backends or problems:
                yield ServiceView(name, vip, backends, problems, service.answer_at)

    def held(self) -> Iterator[ServiceView]:
        """What was found in the kernel and Consul has not spoken of yet: it stays as it is."""
        names = {claimant(name): name for name in (*self.state.services, *(self.state.listed or ()))}
        found: dict[int, dict[VipKey, LiveVip]] = {}
        for key, entry in self.live.vips.items():
            if entry.claimant in self.state.legacy:
                found.setdefault(entry.claimant, {})[key] = entry
        for number, entries in found.items():
            name = names.get(number, unnamed_service(number))
            keys, port = tuple(sorted(entries)), min(entries).port
            entry = max(entries.values(), key=lambda e: e.ring_bits)
            backends = []
            for address, real in sorted(self.reals.get(self.numbers[number], {}).items()):
                duty = Duty.DEAD if real.state is RealState.DEAD else Duty.ACTIVE
                backends.append(Backend(address, port, 1, duty, self._hop(address, real)))
            views = tuple(BackendView("", "", str(b.address), port, Standing.ADOPTED, b) for b in backends)
            vip = Vip(
                name, keys, tuple(backends), entry.ring_bits, self.defaults.settle_s, entry.flags, held=True
            )
            error = self.state.services.get(name, Service()).error
            waiting = "Consul has not answered for it yet: it stays as it was found"
            yield ServiceView(name, vip, views, (*_consul(error), waiting))

    def _vip(self, name: str, service: Service, options: Options, views: tuple[BackendView, ...]) -> Vip:
        backends = sorted((v.backend for v in views if v.backend is not None), key=lambda b: int(b.address))
        mine = claimant(name)
        bits = options.ring_bits
        if bits is None and service.speakers:
            bits = ring_bits(len(service.speakers))
        elif bits is None:  # all departed: a new size would gain nothing
            bits = max(
                (v.ring_bits for v in self.live.vips.values() if v.claimant == mine), default=RING_BITS[0]
            )
        return Vip(
            name,
            tuple(VipKey(options.vip, options.port, proto) for proto in options.protos),
            tuple(backends),
            bits,
            self.defaults.settle_s if options.settle_s is None else options.settle_s,
            UDP_STATELESS if options.udp_stateless else 0,
        )

    # ---- backends -------------------------------------------------------------------------------

    def _backends(self, name: str, service: Service, options: Options) -> Iterator[BackendView]:
        """Registered ones by (node, id), then departed ones, then what only the kernel still knows."""
        number = self.numbers.get(claimant(name))
        reals = {} if number is None else self.reals.get(number, {})
        for address, instance in sorted(service.speakers.items(), key=lambda item: item[1].key):
            hop = self._hop(address, reals.get(address))
            yield self._registered(name, service, options, instance, address, hop)
        for address, departed in sorted(service.departed.items()):
            i, real = departed.instance, reals.get(address)
            lingers = self._lingers(departed, options)
            if lingers or real is not None:
                duty = Duty.DRAINING if lingers and _duty(i.standing, options) is not Duty.DEAD else Duty.DEAD
                backend = Backend(address, options.port, 0, duty, self._hop(address, real))
                yield BackendView(i.node, i.id, i.address, i.port, Standing.GONE, backend)
        for address in sorted(reals.keys() - service.speakers.keys() - service.departed.keys()):
            backend = Backend(address, options.port, 0, Duty.DEAD, self._hop(address, reals[address]))
            yield BackendView("", "", str(address), options.port, Standing.GONE, backend)

    def _registered(
        self,
        name: str,
        service: Service,
        options: Options,
        i: Instance,
        address: IPv4Address,
        hop: Hop | None,
    ) -> BackendView:
        drain = self.state.drains.get((name, i.node, i.id))
        standing = i.standing if drain is None else Standing.DRAINED
        weight = i.weight_warning if i.standing is Standing.WARNING else i.weight_passing
        backend = Backend(address, i.port, weight, _duty(standing, options), hop)
        problems = service.doubts.get(i.key, ())
        if hop is None:
            problems += ("its next hop is not known: it gets no new connections",)
        if drain is not None and i.standing is Standing.CRITICAL:
            problems += ("its checks are critical; being drained, it keeps its connections",)
        reason, since = (drain.reason, drain.since) if drain is not None else ("", 0.0)
        return BackendView(i.node, i.id, i.address, i.port, standing, backend, reason, since, problems)

    def _lingers(self, departed: Departed, options: Options) -> bool:
        linger_s = self.defaults.linger_s if options.linger_s is None else options.linger_s
        return self.now < departed.at + linger_s

    def _hop(self, address: IPv4Address, real: Real | None) -> Hop | None:
        """As links say. Until they have said anything, what the kernel holds is still right."""
        found = real.hop if real is not None else None
        hop = self.state.hops.get(address, found)
        return found if hop is None and self.now < self.state.adopted_at + HOP_GRACE_S else hop


# ---- small decisions ----------------------------------------------------------------------------


def _duty(standing: Standing, options: Options) -> Duty:
    match standing:
        case Standing.PASSING | Standing.WARNING:
            return Duty.ACTIVE
        case Standing.CRITICAL if options.on_critical is OnCritical.MOVE:
            return Duty.DEAD
        case _:
            return Duty.DRAINING


def _refused(service: Service) -> Iterator[BackendView]:
    speaking = {instance.key for instance in service.speakers.values()}
    for i in service.instances:
        if i.key not in speaking:
            problems = service.doubts.get(i.key, ())
            yield BackendView(i.node, i.id, i.address, i.port, Standing.REFUSED, None, problems=problems)


def _is_registered(view: ServiceView) -> bool:
    """Whether it has instances now, or may have: then it is not just lingering."""
    return any(backend.standing not in (Standing.GONE, Standing.REFUSED) for backend in view.backends)


def _judged(view: ServiceView, verdict: Verdict | None) -> ServiceView:
    if verdict is None:
        return view
    backends = tuple(
        replace(b, backend=None, problems=(*b.problems, "no room in the kernel's tables"))
        if b.backend is not None and b.backend.address in verdict.left_out
        else b
        for b in view.backends
    )
    return replace(view, vip=verdict.vip, backends=backends, problems=view.problems + verdict.problems)


def _consul(error: str) -> tuple[str, ...]:
    return (f"Consul: {error}",) if error else ()
