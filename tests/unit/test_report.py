"""The report that operators see: counts of slots and records, and when a backend is empty."""

from __future__ import annotations

from dataclasses import replace

from lbagent.core.desired import BackendView, Desired, ServiceView
from lbagent.core.model import Duty, Live, Snapshot, Vip
from lbagent.core.plan import plan
from lbagent.core.report import Measured, report
from lbagent.core.status import BackendStatus, ServiceStatus, Standing
from lbagent.core.steps import advance
from tests.snapshots import CAPACITY, SEED, backend, vip

WEB = vip("web", backend(1), backend(2))
DRAINED = vip("web", backend(1), backend(2, duty=Duty.DRAINING))


def reach(live: Live, want: Vip) -> Live:
    for step in plan(live, Snapshot((want,)), SEED, 100):
        live = advance(live, step)
    return live


def seen(live: Live, want: Vip | None, measured: Measured) -> ServiceStatus:
    backends = want.backends if want else ()
    views = tuple(
        BackendView(f"n{b.address.packed[3]}", "web", str(b.address), b.port, Standing.PASSING, b)
        for b in backends
    )
    wish = Desired(Snapshot((want,) if want else ()), (ServiceView("web", want, views, ("odd",)),), ())
    return report(wish, live, measured, SEED)[0]


def measured(records: dict[int, int] | None = None) -> Measured:
    return Measured(records or {}, {0: (7, 700)}, {1: (4, 400)}, {2: "eth0"})


def drained(live: Live, records: dict[int, int] | None = None) -> BackendStatus:
    return seen(live, DRAINED, measured(records)).backends[1]


def test_slots_records_and_traffic_are_told_by_backend() -> None:
    live = replace(reach(Live(CAPACITY), WEB), records={})
    status = seen(live, WEB, measured({1: 3}))
    assert (status.serving, status.ring_size, status.packets, status.bytes) == (True, 4096, 7, 700)
    assert status.problems == ("odd",)
    assert [(b.slots, b.records, b.packets, b.empty) for b in status.backends] == [
        (2048, 3, 4, False),
        (2048, 0, 0, False),
    ]
    assert status.backends[0].hop == "02:00:00:00:00:00 dev eth0"


def test_a_drained_backend_is_empty_when_slots_have_settled_and_no_record_names_it() -> None:
    live = reach(reach(Live(CAPACITY), WEB), DRAINED)
    assert drained(live).former_slots == 2048
    assert not drained(replace(live, records={})).empty, "its former slots have not settled"
    settled = reach(Live(CAPACITY), vip("web", backend(1)))
    settled = replace(settled, reals={**live.reals}, records={})
    assert drained(settled).empty
    assert not drained(settled, {2: 1}).empty, "a live record names it"
    assert not drained(replace(settled, records=None)).empty, "no sweep since the swap"


def test_a_backend_that_never_served_is_empty() -> None:
    live = reach(Live(CAPACITY), vip("web", backend(1)))
    assert drained(live).empty
    assert drained(live, {0: 9}).records == 0


def test_a_service_that_is_not_served_is_told_too() -> None:
    status = seen(Live(CAPACITY), None, measured())
    assert (status.serving, status.vips, status.ring_size, status.ring_digest) == (False, (), 0, "")
    assert seen(Live(CAPACITY), WEB, measured()).serving is False
