"""From what is live to what is wanted, in steps that are each safe to stop after.

The order is make before break: reals that nothing names yet, withdrawn VIPs, all changed rings in one
swap, announced VIPs, then what was replaced. `plan` never touches a clock or a kernel; `sweep` is the
periodic half, which ends the tracking of slots once nothing depends on it (core/slots.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from lbagent.core import ring, slots
from lbagent.core.model import (
    Announce,
    Backend,
    ClearReals,
    DropRings,
    Duty,
    ForgetFlows,
    Live,
    LiveVip,
    Real,
    RealState,
    RingId,
    SettleSlots,
    Snapshot,
    Step,
    SwapRings,
    Vip,
    VipKey,
    Withdraw,
    WriteReals,
    claimant,
)
from lbagent.core.steps import advance
from lbagent.errors import InconsistentSnapshot

GENERATIONS = 1 << 16
FLOW_KEY_SIZE = 40  # bytes of `struct flow_key`


def plan(live: Live, want: Snapshot, seed: int, now_s: int) -> tuple[Step, ...]:
    """The steps from `live` to `want`; none when they agree.

    now_s: the data plane's clock in seconds, written into the slots that change.
    Raises InconsistentSnapshot when `want` needs more numbers than there are.
    """
    numbers = number_vips(live, want)
    fresh, changed, dead = _plan_reals(live, want, numbers)
    reals = {**live.reals, **fresh, **changed, **dead}
    rings: dict[RingId, bytes] = {}
    vips: dict[VipKey, LiveVip] = {}
    for vip in want.vips:
        number = numbers[vip.service]
        ring_id, content = _plan_ring(live, vip, number, reals, seed, now_s)
        if live.rings.get(ring_id) != content:
            rings[ring_id] = content
        entry = LiveVip(number, ring_id.bits, vip.flags, claimant(vip.service))
        vips |= {key: entry for key in vip.keys if live.vips.get(key) != entry}

    wanted_keys = {key for vip in want.vips for key in vip.keys}
    withdrawn = tuple(sorted(key for key in live.vips if key not in wanted_keys))
    steps: list[Step] = []
    if fresh or changed:
        steps.append(WriteReals({**fresh, **changed}))
    if withdrawn:
        steps.append(Withdraw(withdrawn))
    if rings:
        steps.append(SwapRings(rings))
    if vips:
        steps.append(Announce(vips))
    if dead:
        steps.append(WriteReals(dead))
    after = live
    for step in steps:
        after = advance(after, step)
    if unused := _unused_rings(after):
        steps.append(DropRings(unused))
        after = advance(after, steps[-1])
    if freed := _clearable(live, after, want, numbers):
        steps.append(ClearReals(freed))
    return tuple(steps)


# ---- numbers ------------------------------------------------------------------------------------


def number_vips(live: Live, want: Snapshot) -> dict[str, int]:
    """The VIP number of each wanted service: the one it has, else the lowest that nothing uses."""
    held: dict[int, list[int]] = {}
    for vip in live.vips.values():
        held.setdefault(vip.claimant, []).append(vip.number)
    used = {vip.number for vip in live.vips.values()} | {ring_id.vip for ring_id in live.rings}
    used |= {real.vip for real in live.reals.values() if real.state is not RealState.FREE}
    free = (n for n in range(live.capacity.vips) if n not in used)
    return {
        vip.service: min(mine) if (mine := held.get(claimant(vip.service))) else _next(free, "VIPs")
        for vip in want.vips
    }


def _next(free: Iterator[int], what: str) -> int:
    try:
        return next(free)
    except StopIteration:
        raise InconsistentSnapshot(f"more {what} are wanted than the maps hold") from None


def reals_by_vip(live: Live) -> dict[int, dict[IPv4Address, int]]:
    """Real numbers in use, by VIP number and address."""
    found: dict[int, dict[IPv4Address, int]] = {}
    for n, real in live.reals.items():
        if real.state is not RealState.FREE:
            found.setdefault(real.vip, {})[real.address] = n
    return found


def _plan_reals(
    live: Live, want: Snapshot, numbers: Mapping[str, int]
) -> tuple[dict[int, Real], dict[int, Real], dict[int, Real]]:
    """(reals to fill, reals to change in place, reals to declare dead once no ring names them)."""
    used = {n for n, real in live.reals.items() if real.state is not RealState.FREE}
    free = (n for n in range(1, live.capacity.reals) if n not in used)
    by_vip = reals_by_vip(live)
    fresh: dict[int, Real] = {}
    changed: dict[int, Real] = {}
    dead: dict[int, Real] = {}
    for vip in want.vips:
        number = numbers[vip.service]
        mine = by_vip.get(number, {})
        for backend in vip.backends:
            n = mine.get(backend.address)
            if n is None:
                if backend.share:
                    n = _next(free, "reals")
                    fresh[n] = Real(
                        backend.address, number, _generation(live, n), RealState.SERVING, backend.hop
                    )
                continue
            old = live.reals[n]
            new = replace(old, hop=backend.hop or old.hop)
            if backend.duty is not Duty.DEAD:
                new = replace(new, state=RealState.SERVING)
            if new != old:
                changed[n] = new
            if backend.duty is Duty.DEAD and new.state is not RealState.DEAD:
                dead[n] = replace(new, state=RealState.DEAD)
    return fresh, changed, dead


def _generation(live: Live, number: int) -> int:
    old = live.reals.get(number)
    return 0 if old is None else (old.generation + 1) % GENERATIONS


# ---- rings --------------------------------------------------------------------------------------


def members(backends: Iterable[Backend]) -> tuple[ring.Member, ...]:
    return tuple(ring.Member(b.address, b.port, b.share) for b in backends if b.share)


def _plan_ring(
    live: Live, vip: Vip, number: int, reals: Mapping[int, Real], seed: int, now_s: int
) -> tuple[RingId, bytes]:
    """The ring that `vip` should have, and the place it goes to.

    A ring grows at once. It shrinks only when that loses nothing: until then the small ring is kept
    stretched over the slots of the big one, so every node's choice is already that of the small ring.
    """
    have = _live_ring(live, vip, number)
    if vip.held and have is not None:
        return have, live.rings[have]
    shares = members(vip.backends)
    real_of = {reals[n].address: n for n in reals if _serves(reals[n], number)}
    table = ring.build(shares, vip.ring_bits, seed)
    owners = slots.renumber(table, [real_of[member.address] for member in shares])
    if have is None:
        return RingId(number, vip.ring_bits), slots.fresh(owners)
    content = live.rings[have]
    dead = {real_of[b.address] for b in vip.backends if b.duty is Duty.DEAD and b.address in real_of}
    dead |= {n for n in real_of.values() if reals[n].state is RealState.DEAD}
    if have.bits < vip.ring_bits:
        grown = slots.resize(content, have.bits, vip.ring_bits)
        assert grown is not None, "growing always succeeds"
        return RingId(number, vip.ring_bits), slots.succeed(grown, owners, dead, now_s)
    if have.bits > vip.ring_bits:
        stretched = slots.stretch(owners, vip.ring_bits, have.bits)
        content = slots.succeed(content, stretched, dead, now_s)
        shrunk = slots.resize(content, have.bits, vip.ring_bits)
        return (have, content) if shrunk is None else (RingId(number, vip.ring_bits), shrunk)
    return have, slots.succeed(content, owners, dead, now_s)


def _serves(real: Real, number: int) -> bool:
    return real.vip == number and real.state is not RealState.FREE


def _live_ring(live: Live, vip: Vip, number: int) -> RingId | None:
    """The ring packets to this VIP use now. After a change of size that was cut short its keys may name
    two; the wanted size is then the newer one."""
    mine = claimant(vip.service)
    named = {
        RingId(v.number, v.ring_bits) for v in live.vips.values() if v.number == number and v.claimant == mine
    }
    wanted = RingId(number, vip.ring_bits)
    return wanted if wanted in named else max(named, default=None)


def _unused_rings(live: Live) -> tuple[RingId, ...]:
    named = {RingId(vip.number, vip.ring_bits) for vip in live.vips.values()}
    return tuple(sorted(ring_id for ring_id in live.rings if ring_id not in named))


# ---- clearing -----------------------------------------------------------------------------------


def _clearable(live: Live, after: Live, want: Snapshot, numbers: Mapping[str, int]) -> tuple[int, ...]:
    """Reals that nobody wants and that no ring and no flow record names. A ring that does not name one now
    cannot name it after the plan."""
    if live.records is None:
        return ()
    kept = {(numbers[v.service], b.address) for v in want.vips for b in v.backends if b.duty is not Duty.DEAD}
    idle = {
        n
        for n, real in after.reals.items()
        if real.state is not RealState.FREE
        and (real.vip, real.address) not in kept
        and not live.records.get(n)
    }
    if not idle:
        return ()
    vips = {after.reals[n].vip for n in idle}
    for ring_id, content in live.rings.items():
        if ring_id.vip in vips:
            owners, elders = slots.census(content)
            idle -= owners.keys() | elders.keys()
    return tuple(sorted(idle))


# ---- the periodic sweep -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sweep:
    """Steps that end what has settled, and the live records by real number."""

    steps: tuple[Step, ...]
    records: Mapping[int, int]


def sweep(
    live: Live, keys: bytes, values: bytes, count: int, settle_s: Mapping[int, int], now_ns: int
) -> Sweep:
    """Judge all flow records and tracked slots.

    keys, values: `count` raw `struct flow_key`s and `struct flow`s, read after the latest ring swap.
    settle_s: by VIP number; a slot or record silent for longer is over. Slots settle first: no packet adds a
    record to them any more, so those they have can all go. One that stayed would be believed again should
    its slot be tracked anew.
    """
    rings = {
        vip.number: (vip.ring_bits, live.rings[RingId(vip.number, vip.ring_bits)], settle_s[vip.number])
        for vip in live.vips.values()
    }
    reals = {n: (r.vip, r.generation, r.state is RealState.SERVING) for n, r in live.reals.items()}
    verdict = slots.judge(keys, values, count, rings, reals, now_ns)
    steps: list[Step] = []
    for number, (bits, content, after_s) in sorted(rings.items()):
        exceptions = verdict.exceptions.get(number, ())
        if over := slots.settled(content, exceptions, after_s, now_ns // 1_000_000_000):
            steps.append(SettleSlots(RingId(number, bits), tuple(over)))
            rings[number] = bits, slots.settle(content, over), after_s
    if steps:
        verdict = slots.judge(keys, values, count, rings, reals, now_ns)
    if verdict.forget:
        size = FLOW_KEY_SIZE
        steps.append(ForgetFlows(tuple(keys[i * size : (i + 1) * size] for i in verdict.forget)))
    return Sweep(tuple(steps), verdict.live)
