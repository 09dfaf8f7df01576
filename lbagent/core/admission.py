"""Who gets in: one service per key, and no more VIPs and reals than the kernel's maps hold.

Whoever is in the kernel already stays there before anybody new comes, so what is decided here does not
depend on the order in which things became known.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from lbagent.core.model import Live, Real, RealState, Vip, VipKey, claimant


@dataclass(frozen=True, slots=True)
class Claim:
    """vip: what a service wants. registered: it has instances now, so it is not just lingering."""

    vip: Vip
    registered: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """vip: what it gets, None: nothing. left_out: backends that found no room."""

    vip: Vip | None
    problems: tuple[str, ...] = ()
    left_out: frozenset[IPv4Address] = frozenset()


@dataclass(slots=True)
class Room:
    """What is free in the kernel's maps. Numbers still in use for what goes away count as used."""

    numbers: int
    reals: int


def admit(claims: Sequence[Claim], live: Live) -> dict[str, Verdict]:
    """A verdict for each service that claims. Services are unique."""
    held = live_numbers(live)
    reals = live_reals(live)
    winners = _award(claims, live)
    room = _room(live)
    verdicts: dict[str, Verdict] = {}
    for claim in sorted(claims, key=lambda c: (claimant(c.vip.service) not in held, c.vip.service)):
        name = claim.vip.service
        keys = tuple(key for key in claim.vip.keys if winners[key] == name)
        lost = tuple(f"{key} is taken by service {winners[key]}" for key in claim.vip.keys if key not in keys)
        if not keys:
            verdicts[name] = Verdict(None, lost)
            continue
        vip, number = replace(claim.vip, keys=keys), held.get(claimant(name))
        verdict = _fit_new(vip, room) if number is None else _fit_live(vip, reals.get(number, {}), room)
        verdicts[name] = replace(verdict, problems=lost + verdict.problems)
    return verdicts


def live_numbers(live: Live) -> dict[int, int]:
    """VIP number by claimant."""
    found: dict[int, int] = {}
    for vip in live.vips.values():
        found[vip.claimant] = min(vip.number, found.get(vip.claimant, vip.number))
    return found


def live_reals(live: Live) -> dict[int, dict[IPv4Address, Real]]:
    """Reals in use, by VIP number and address."""
    found: dict[int, dict[IPv4Address, Real]] = {}
    for real in live.reals.values():
        if real.state is not RealState.FREE:
            found.setdefault(real.vip, {})[real.address] = real
    return found


def _award(claims: Sequence[Claim], live: Live) -> dict[VipKey, str]:
    """Who gets each key: of those with instances the one that has it already, else the first by name."""
    ranks: dict[VipKey, tuple[bool, bool, str]] = {}
    for claim in claims:
        name = claim.vip.service
        for key in claim.vip.keys:
            rank = (not claim.registered, not _has(live, key, name), name)
            ranks[key] = min(rank, ranks.get(key, rank))
    return {key: name for key, (_, _, name) in ranks.items()}


def _has(live: Live, key: VipKey, service: str) -> bool:
    return key in live.vips and live.vips[key].claimant == claimant(service)


def _room(live: Live) -> Room:
    reals = [real for real in live.reals.values() if real.state is not RealState.FREE]
    numbers = {vip.number for vip in live.vips.values()} | {ring.vip for ring in live.rings}
    numbers |= {real.vip for real in reals}
    return Room(live.capacity.vips - len(numbers), live.capacity.reals - 1 - len(reals))


def _fit_new(vip: Vip, room: Room) -> Verdict:
    """Whole or not at all."""
    need = sum(backend.share > 0 for backend in vip.backends)
    if room.numbers < 1:
        return Verdict(None, ("no room: the kernel's tables hold no more VIPs (edge.vips)",))
    if room.reals < need:
        why = f"no room: it needs {need} reals, the kernel's tables have {room.reals} left (edge.reals)"
        return Verdict(None, (why,))
    room.numbers -= 1
    room.reals -= need
    return Verdict(vip)


def _fit_live(vip: Vip, there: Container[IPv4Address], room: Room) -> Verdict:
    """What it has it keeps; of what is new it gets what fits."""
    fresh = [b.address for b in vip.backends if b.share and b.address not in there]
    left_out = frozenset(fresh[room.reals :])
    room.reals -= len(fresh) - len(left_out)
    if not left_out:
        return Verdict(vip)
    backends = tuple(b for b in vip.backends if b.address not in left_out)
    problem = f"no room for {len(left_out)} backends in the kernel's tables (edge.reals)"
    return Verdict(replace(vip, backends=backends), (problem,), left_out)
