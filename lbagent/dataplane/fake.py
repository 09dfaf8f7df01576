"""A data plane without a kernel, for tests and --dry-run. It judges every step before it takes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from lbagent.core.model import (
    Capacity,
    ClearReals,
    DropRings,
    ForgetFlows,
    Live,
    RealState,
    RingId,
    Step,
)
from lbagent.core.steps import advance, judge
from lbagent.dataplane import Counters, Records, refuse_overflow
from lbagent.errors import DataplaneError, InconsistentSnapshot


class Fake:
    """Holds a Live instead of a kernel. `flows` may be filled by a test: raw key -> raw value."""

    def __init__(self, capacity: Capacity, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.live = Live(capacity)
        self.flows: dict[bytes, bytes] = {}
        self.now_ns = now_ns

    def read(self) -> Live:
        return replace(self.live, records=None)

    def apply(self, step: Step) -> None:
        refuse_overflow(self.live.capacity, step)
        self._refuse_impossible(step)
        after = advance(self.live, step)
        try:
            judge(after)
        except InconsistentSnapshot as wrong:
            raise DataplaneError(f"refused {type(step).__name__}: {wrong}") from wrong
        self.live = after
        if isinstance(step, ForgetFlows):
            for key in step.keys:
                self.flows.pop(key, None)

    def records(self) -> Records:
        return Records(b"".join(self.flows), b"".join(self.flows.values()), len(self.flows))

    def counters(self) -> Counters:
        vips = {vip.number: (0, 0) for vip in self.live.vips.values()}
        reals = {n: (0, 0) for n, real in self.live.reals.items() if real.state is not RealState.FREE}
        return Counters(vips, reals, {})

    def _refuse_impossible(self, step: Step) -> None:
        """What the kernel would refuse, or what would pull something from under a packet."""
        match step:
            case DropRings(rings):
                named = {RingId(vip.number, vip.ring_bits) for vip in self.live.vips.values()}
                if lost := named.intersection(rings):
                    raise DataplaneError(f"rings {sorted(lost)} are still named by a VIP")
            case ClearReals(numbers):
                if unknown := set(numbers) - self.live.reals.keys():
                    raise DataplaneError(f"reals {sorted(unknown)} were never written")
            case _:
                pass
