"""The one writer: events become state, state becomes a want, a want becomes steps in the kernel.

An event only sets a wake-up. Whatever arrives while the kernel is being written is the next batch; there
is no timer that batches. Start, retry and restart are one path: read what is live, plan, apply. The data
plane is only ever used on one thread of its own, because its calls wait for the kernel.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from lbagent.core.desired import Defaults, Desired, check, desired
from lbagent.core.model import Live, Step, SwapRings, claimant
from lbagent.core.plan import plan, sweep
from lbagent.core.state import Adopted, Event, State, fold
from lbagent.core.steps import advance
from lbagent.dataplane import Counters, Dataplane
from lbagent.errors import DataplaneError, InconsistentSnapshot

SWEEP_S = 1.0  # how often records and tracked slots are judged
RETRY_S = (0.1, 5.0)  # first and longest wait after the kernel refused

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Pass:
    """What one turn of the loop found and did; all that a report is made of.

    records: live records by real number, flows: records at all, and counters: as of the latest sweep
    (Live.records is None right after a swap). full: Consul's first full answer is applied. swept: this turn
    did a sweep.
    """

    live: Live
    desired: Desired
    steps: tuple[Step, ...]
    records: Mapping[int, int]
    flows: int
    counters: Counters
    at: float
    ms: float
    full: bool
    swept: bool


@dataclass(slots=True)
class Tally:
    """Counts since the start, for the status."""

    applies: int = 0
    errors: int = 0
    applied_at: float = 0.0
    problem: str = ""


class Reconciler:
    """Owns the state and the data plane. `emit` from the event loop only."""

    def __init__(
        self,
        dataplane: Dataplane,
        state: State,
        defaults: Defaults,
        seed: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.state = state
        self.seed = seed
        self.tally = Tally()
        self.last: Pass | None = None
        self._dataplane = dataplane
        self._defaults = defaults
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "dataplane")
        self._wake = asyncio.Event()
        self._turn = asyncio.Event()
        self._emitted = 0
        self._applied = 0
        self._live: Live | None = None
        self._sweep_at = 0.0
        self._settle_s: dict[int, int] = {}  # by VIP number, as of the latest want
        self._records: Mapping[int, int] = {}
        self._flows = 0
        self._counters = Counters({}, {}, {})

    def emit(self, event: Event) -> None:
        """Take an event into the state and wake the writer."""
        self.state = fold(self.state, event)
        self._emitted += 1
        self._wake.set()

    async def run(self) -> None:
        """Reconcile until cancelled. A kernel call under way is always finished."""
        retry_s = RETRY_S[0]
        try:
            while True:
                try:
                    await self._once()
                    retry_s = RETRY_S[0]
                    wait_s = SWEEP_S
                except DataplaneError as error:
                    self._note_error(error)
                    wait_s = retry_s * random.uniform(0.5, 1.0)
                    retry_s = min(retry_s * 2, RETRY_S[1])
                    await asyncio.sleep(wait_s)
                    continue
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._thread.shutdown(wait=True)

    async def settled(self) -> Pass:
        """The pass that took in every event emitted so far."""
        mark = self._emitted
        while self.last is None or self._applied < mark:
            await self._turn.wait()
        return self.last

    async def refreshed(self) -> Pass:
        """A pass with a sweep that began after this call."""
        asked = time.monotonic()
        while self.last is None or not self.last.swept or self._sweep_at < asked:
            self._sweep_at = min(self._sweep_at, asked - SWEEP_S)
            self._wake.set()
            await self._turn.wait()
        return self.last

    async def next_pass(self) -> Pass:
        """The next pass to end."""
        await self._turn.wait()
        assert self.last is not None
        return self.last

    async def _once(self) -> None:
        self._wake.clear()
        mark = self._emitted
        loop = asyncio.get_running_loop()
        if self._live is None:
            self._live = await _finish(loop.run_in_executor(self._thread, self._dataplane.read))
            if self.last is None:
                self.state = fold(self.state, Adopted(self._live, self._clock()))
        turn = await _finish(loop.run_in_executor(self._thread, self._work, self.state, self._live))
        self._live, self.last, self._applied = turn.live, turn, mark
        if turn.steps:
            self.tally.applies += 1
            self.tally.applied_at = turn.at
            swapped = sum(len(s.rings) for s in turn.steps if isinstance(s, SwapRings))
            names = [type(step).__name__ for step in turn.steps]
            log.info("applied", steps=names, rings_swapped=swapped, ms=round(turn.ms, 1))
        ended, self._turn = self._turn, asyncio.Event()
        ended.set()

    def _work(self, state: State, live: Live) -> Pass:
        """On the data plane's thread: sweep when due, then plan and apply."""
        began, at = time.perf_counter(), self._clock()
        swept = time.monotonic() - self._sweep_at >= SWEEP_S
        if swept:
            self._sweep_at = time.monotonic()
            live = self._sweep(live)
        wish = desired(state, live, self._defaults, at)
        steps = self._plan(live, wish)
        for step in steps:
            self._dataplane.apply(step)
            live = advance(live, step)
        settle_s = {claimant(vip.service): vip.settle_s for vip in wish.want.vips}
        self._settle_s = {
            v.number: settle_s.get(v.claimant, self._defaults.settle_s) for v in live.vips.values()
        }
        return Pass(
            live=live,
            desired=wish,
            steps=steps,
            records=self._records,
            flows=self._flows,
            counters=self._counters,
            at=at,
            ms=(time.perf_counter() - began) * 1e3,
            full=state.full_at > 0,
            swept=swept,
        )

    def _plan(self, live: Live, wish: Desired) -> tuple[Step, ...]:
        """None when the want makes no sense: what is live stays."""
        try:
            check(wish.want)
            steps = plan(live, wish.want, self.seed, self._dataplane.now_ns() // 1_000_000_000)
        except InconsistentSnapshot as wrong:
            if str(wrong) != self.tally.problem:
                log.error("want_refused", why=str(wrong))
            self.tally.problem = str(wrong)
            return ()
        self.tally.problem = ""
        return steps

    def _sweep(self, live: Live) -> Live:
        table = self._dataplane.records()
        settle_s = {v.number: self._defaults.settle_s for v in live.vips.values()} | self._settle_s
        found = sweep(live, table.keys, table.values, table.count, settle_s, self._dataplane.now_ns())
        for step in found.steps:
            self._dataplane.apply(step)
            live = advance(live, step)
        self._records, self._flows = found.records, sum(found.records.values())
        self._counters = self._dataplane.counters()
        return replace(live, records=found.records)

    def _note_error(self, error: DataplaneError) -> None:
        self.tally.errors += 1
        self.tally.problem = str(error)
        self._live = None
        log.error("dataplane_error", why=str(error), errno=error.errno)


T = TypeVar("T")


async def _finish(call: asyncio.Future[T]) -> T:
    """Await a call on the data plane's thread; when cancelled, wait for it and go on being cancelled."""
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        raise
