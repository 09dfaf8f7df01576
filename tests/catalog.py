"""Instances and events as Consul may tell them, and a kernel that simply has what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address

from hypothesis import strategies as st

from lbagent.core.admission import live_numbers, live_reals
from lbagent.core.instances import Instance
from lbagent.core.model import (
    Capacity,
    Duty,
    Hop,
    Live,
    LiveVip,
    Real,
    RealState,
    RingId,
    Snapshot,
    VipKey,
    claimant,
)
from lbagent.core.state import (
    CatalogAnswered,
    ConsulFailed,
    Drained,
    Event,
    HopsChanged,
    ServiceAnswered,
    State,
    Undrained,
    fold,
)
from lbagent.core.status import Standing

HOP = Hop(b"\2\0\0\0\0\1", b"\2\0\0\0\0\xfe", 2, 1500)
EMPTY = Live(Capacity(vips=8, reals=64, flows=1024))
VIP = "203.0.113.1"


def ip(text: str) -> IPv4Address:
    return IPv4Address(text)


def instance(
    n: int,
    standing: Standing = Standing.PASSING,
    *,
    id: str = "",
    address: str = "",
    port: int = 80,
    weights: tuple[int, int] = (1, 1),
    tags: tuple[str, ...] = (),
    **meta: str,
) -> Instance:
    """Number n runs on node n and has 10.0.0.n; options as vip="...", on_critical="keep"."""
    meta = {"vip": VIP} | meta
    options = {f"lb-{key.replace('_', '-')}": value for key, value in meta.items() if value}
    return Instance(f"n{n}", id or f"i{n}", address or f"10.0.0.{n}", port, tags, options, *weights, standing)


def told(*events: Event, state: State | None = None) -> State:
    """The state after these events; every 10.0.0.n has a next hop."""
    state = state or fold(State(), HopsChanged({ip(f"10.0.0.{n}"): HOP for n in range(1, 60)}))
    for event in events:
        state = fold(state, event)
    return state


def web(*instances: Instance, at: float = 100.0) -> ServiceAnswered:
    return ServiceAnswered("web", instances, at)


def applied(live: Live, want: Snapshot, *, cleared: bool = False) -> Live:
    """A kernel that has what is wanted. cleared: dead and unwanted reals are gone, too."""
    numbers, by_vip = live_numbers(live), live_reals(live)
    reals = {} if cleared else dict(live.reals)
    used = {vip.number for vip in live.vips.values()} | {real.vip for real in live.reals.values()}
    vips: dict[VipKey, LiveVip] = {}
    for vip in want.vips:
        number = numbers.get(claimant(vip.service))
        if number is None:
            number = min(set(range(live.capacity.vips)) - used)
            used.add(number)
        vips |= {key: LiveVip(number, vip.ring_bits, vip.flags, claimant(vip.service)) for key in vip.keys}
        for backend in vip.backends:
            old = by_vip.get(number, {}).get(backend.address)
            taken = next((n for n, real in live.reals.items() if real is old), None)
            if taken is None and not backend.share:
                continue
            if taken is None:
                taken = min(set(range(1, live.capacity.reals)) - reals.keys() - live.reals.keys())
            dead = backend.duty is Duty.DEAD
            if dead and cleared:
                reals.pop(taken, None)
                continue
            state = RealState.DEAD if dead else RealState.SERVING
            reals[taken] = Real(backend.address, number, 0, state, backend.hop or (old.hop if old else None))
    rings = {RingId(vip.number, vip.ring_bits): b"" for vip in vips.values()}
    return replace(live, vips=vips, rings=rings, reals=reals)


# ---- anything -----------------------------------------------------------------------------------

SERVICES = ("api", "dns", "web")
VARIANTS: tuple[Callable[[int, str], Instance], ...] = (
    lambda n, i: instance(n, id=i),
    lambda n, i: instance(n, id=i, weights=(3, 0)),
    lambda n, i: instance(n, Standing.WARNING, id=i, weights=(3, 0)),
    lambda n, i: instance(n, Standing.CRITICAL, id=i),
    lambda n, i: instance(n, Standing.CRITICAL, id=i, on_critical="keep"),
    lambda n, i: instance(n, Standing.MAINTENANCE, id=i),
    lambda n, i: instance(n, id=i, address="10.0.0.9"),
    lambda n, i: instance(n, id=i, address="fd00::1"),
    lambda n, i: instance(n, id=i, address=VIP),
    lambda n, i: instance(n, id=i, port=81),
    lambda n, i: instance(n, id=i, proto="both"),
    lambda n, i: instance(n, id=i, proto="udp", ring_size="16384"),
    lambda n, i: instance(n, id=i, vip="203.0.113.2"),
    lambda n, i: instance(n, id=i, vip="nonsense"),
    lambda n, i: instance(n, id=i, vip=""),
)
POOL = [variant(n, letter) for n in range(1, 5) for letter in "ab" for variant in VARIANTS]

instances = st.lists(st.sampled_from(POOL), max_size=5, unique_by=lambda i: i.key).map(tuple)


def answers(at: float) -> st.SearchStrategy[ServiceAnswered]:
    return st.builds(ServiceAnswered, st.sampled_from(SERVICES), instances, st.just(at))


def failures(at: float) -> st.SearchStrategy[ConsulFailed]:
    return st.builds(ConsulFailed, st.none() | st.sampled_from(SERVICES), st.just("HTTP 500"), st.just(at))


def events(at: float) -> st.SearchStrategy[Event]:
    who = (st.sampled_from(SERVICES), st.sampled_from(["n1", "n2"]), st.sampled_from("ab"))
    listed = st.frozensets(st.sampled_from(SERVICES))
    hops = st.dictionaries(st.integers(1, 9).map(lambda n: ip(f"10.0.0.{n}")), st.none() | st.just(HOP))
    return st.one_of(
        answers(at),
        answers(at),
        failures(at),
        st.builds(CatalogAnswered, listed, st.just(at)),
        st.builds(Drained, *who, st.just("why"), st.just(at)),
        st.builds(Undrained, *who),
        st.builds(HopsChanged, hops),
    )
