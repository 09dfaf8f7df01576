"""The data plane's protocol: what the reconciler may ask of the kernel, or of the fake that stands in.

Two implementations, `kernel` and `fake`; tests/contract holds both to the same behaviour. All calls may
block for some milliseconds (RCU grace periods, batches) and belong on the data plane's own thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lbagent.core.model import Announce, Capacity, Live, Step, SwapRings, WriteReals
from lbagent.errors import DataplaneError


@dataclass(frozen=True, slots=True)
class Records:
    """All flow records at one moment: `count` raw `struct flow_key`s and `struct flow`s of bpf/abi.h."""

    keys: bytes
    values: bytes
    count: int


@dataclass(frozen=True, slots=True)
class Counters:
    """(packets, bytes) by VIP number and by real number, packets by `enum drop`, sums over all CPUs."""

    vips: Mapping[int, tuple[int, int]]
    reals: Mapping[int, tuple[int, int]]
    drops: Mapping[str, int]


class Dataplane(Protocol):
    def read(self) -> Live:
        """What is there now; `records` is None. Raises DataplaneError."""

    def apply(self, step: Step) -> None:
        """Write one step and read back what was written. Raises DataplaneError; the step may then be half
        done, but never so that a packet meets something incomplete: read() and plan again."""

    def records(self) -> Records:
        """A copy of the flow table."""

    def counters(self) -> Counters:
        """Counters of the VIPs and reals in use, and all drop reasons."""

    def now_ns(self) -> int:
        """The clock of slots and records (CLOCK_MONOTONIC)."""


def refuse_overflow(capacity: Capacity, step: Step) -> None:
    """Raise DataplaneError for numbers that the maps do not have."""
    match step:
        case WriteReals(reals) if bad := [n for n in reals if not 0 < n < capacity.reals]:
            raise DataplaneError(f"reals: numbers {bad} are outside 1..{capacity.reals - 1}")
        case SwapRings(rings) if bad := [r.vip for r in rings if not 0 <= r.vip < capacity.vips]:
            raise DataplaneError(f"rings: VIP numbers {bad} are outside 0..{capacity.vips - 1}")
        case Announce(vips) if bad := [v.number for v in vips.values() if not 0 <= v.number < capacity.vips]:
            raise DataplaneError(f"vips: numbers {bad} are outside 0..{capacity.vips - 1}")
        case _:
            pass
