"""The one writer, on the fake data plane: batches, retries, refusals, and what waiters are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address

import pytest

from lbagent import reconciler as module
from lbagent.core.desired import Defaults
from lbagent.core.instances import Instance
from lbagent.core.model import Capacity, Live, Step, SwapRings
from lbagent.core.state import CatalogAnswered, Drained, HopsChanged, ServiceAnswered, State
from lbagent.core.status import Standing
from lbagent.dataplane.fake import Fake
from lbagent.errors import DataplaneError
from lbagent.reconciler import Reconciler
from tests.snapshots import CAPACITY, HOPS, SEED

ADDRESSES = [IPv4Address(f"10.77.0.{n}") for n in (1, 2, 3)]


class Faulty(Fake):
    """Counts what is asked of it, may be told to fail or to be slow."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self.reads = 0
        self.swaps = 0
        self.refusals = 0
        self.gate = threading.Event()
        self.gate.set()

    def read(self) -> Live:
        self.reads += 1
        return super().read()

    def apply(self, step: Step) -> None:
        self.gate.wait(10)
        if self.refusals:
            self.refusals -= 1
            raise DataplaneError("no", 12)
        self.swaps += isinstance(step, SwapRings)
        super().apply(step)


def instance(n: int, standing: Standing = Standing.PASSING, service: str = "web") -> Instance:
    vip = {"web": "203.0.113.1", "api": "203.0.113.2"}[service]
    address = str(ADDRESSES[n - 1])
    return Instance(f"n{n}", f"{service}-{n}", address, 80, ("lb",), {"lb-vip": vip}, 1, 1, standing)


def answered(*standings: Standing, service: str = "web") -> ServiceAnswered:
    instances = tuple(instance(n, s, service) for n, s in enumerate(standings, 1))
    return ServiceAnswered(service, instances, 1.0)


PASSING, CRITICAL = Standing.PASSING, Standing.CRITICAL


@asynccontextmanager
async def running(dataplane: Fake) -> AsyncIterator[Reconciler]:
    """A reconciler that knows of `web` with three passing instances."""
    found = Reconciler(dataplane, State(), Defaults(), SEED, clock=lambda: 100.0)
    found.emit(CatalogAnswered(frozenset({"web"}), 1.0))
    found.emit(answered(PASSING, PASSING, PASSING))
    found.emit(HopsChanged(dict.fromkeys(ADDRESSES, HOPS[0])))
    task = asyncio.create_task(found.run(), name="reconciler")
    try:
        yield found
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", (0.0, 0.0))


async def test_what_was_emitted_is_live_once_settled() -> None:
    dataplane = Faulty(CAPACITY)
    async with running(dataplane) as reconciler:
        done = await reconciler.settled()
    assert done.full
    assert [str(key) for key in dataplane.live.vips] == ["203.0.113.1:80/tcp"]
    assert reconciler.tally.applies == 1


async def test_events_during_an_apply_become_one_batch() -> None:
    dataplane = Faulty(CAPACITY)
    async with running(dataplane) as reconciler:
        await reconciler.settled()
        dataplane.gate.clear()
        reconciler.emit(answered(CRITICAL, PASSING, PASSING))
        await asyncio.sleep(0)  # the writer takes this one up
        for turn in range(50):
            reconciler.emit(answered(PASSING, *([CRITICAL, PASSING] if turn % 2 else [PASSING, CRITICAL])))
        dataplane.gate.set()
        await reconciler.settled()
    assert dataplane.swaps <= 3, "the first, the one under way, and one for all the rest"


async def test_a_refusal_by_the_kernel_is_read_back_and_tried_again() -> None:
    dataplane = Faulty(CAPACITY)
    async with running(dataplane) as reconciler:
        await reconciler.settled()
        reads = dataplane.reads
        dataplane.refusals = 2
        reconciler.emit(answered(CRITICAL, PASSING, PASSING))
        await reconciler.settled()
        assert dataplane.reads == reads + 2
        assert reconciler.tally.errors == 2
        assert not reconciler.tally.problem


async def test_another_kind_of_error_ends_the_process() -> None:
    class Broken(Fake):
        def read(self) -> Live:
            raise ZeroDivisionError  # the bug that we do not know of

    with pytest.raises(ZeroDivisionError):
        await Reconciler(Broken(CAPACITY), State(), Defaults(), SEED).run()


async def test_a_drain_is_live_when_the_waiter_is_told() -> None:
    dataplane = Faulty(CAPACITY)
    async with running(dataplane) as reconciler:
        await reconciler.settled()
        reconciler.emit(Drained("web", "n1", "web-1", "test", 5.0))
        done = await reconciler.settled()
        view = next(b for b in done.desired.services[0].backends if b.node == "n1")
        assert view.standing is Standing.DRAINED
        assert dataplane.swaps == 2


async def test_refreshed_brings_a_sweep_that_began_after_the_question() -> None:
    dataplane = Faulty(CAPACITY)
    async with running(dataplane) as reconciler:
        first = await reconciler.settled()
        again = await reconciler.refreshed()
        assert again is not first
        assert again.swept
        assert again.live.records == {}


async def test_cancellation_waits_for_the_kernel_call_under_way() -> None:
    dataplane = Faulty(CAPACITY)
    async with running(dataplane) as reconciler:
        await reconciler.settled()
        dataplane.gate.clear()
        reconciler.emit(answered(CRITICAL, PASSING, PASSING))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, dataplane.gate.set)
    assert dataplane.swaps == 2, "the step was finished before the task ended"
