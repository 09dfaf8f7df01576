"""SIGKILL in the middle of an apply: no packet is lost, and the next start ends where it would have."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lbagent.core.model import Backend, Duty, Live, Proto, RealState, Snapshot, Vip, VipKey
from lbagent.core.plan import plan, sweep
from lbagent.core.steps import advance, judge
from lbagent.dataplane import Dataplane, libbpf
from lbagent.dataplane.fake import Fake
from lbagent.dataplane.kernel import Kernel
from tests.kernel.test_histories import ACK, SYN, frame
from tests.loaded import CAPACITY, VIP, Loaded, hop_to, real_address
from tests.snapshots import view
from tests.vectors import Flow

pytestmark = pytest.mark.kernel

SEED = 11
KILLS = 25
FORK = multiprocessing.get_context("fork")  # spawning anew would take longer than what is to be interrupted


def random_want(rng: random.Random) -> Snapshot:
    """`web` is always wanted, with at least one backend of many; others come, go and change size."""
    vips = [_vip("web", 1, rng, rng.choice([12, 14]))]
    vips += [_vip(f"x{n}", n, rng, 12) for n in range(2, 6) if rng.random() < 0.6]
    return Snapshot(tuple(vips))


def _vip(service: str, n: int, rng: random.Random, bits: int) -> Vip:
    hosts = sorted(rng.sample(range(1, 9), rng.randint(1, 6)))
    duties = [Duty.ACTIVE, *rng.choices([Duty.ACTIVE, Duty.DRAINING, Duty.DEAD], k=len(hosts) - 1)]
    backends = tuple(
        Backend(real_address(host), 80, rng.randint(1, 3), duty, hop_to(host))
        for host, duty in zip(hosts, duties, strict=True)
    )
    return Vip(service, (VipKey(VIP + (n - 1), 80, Proto.TCP),), backends, bits, 1)


def reach(dataplane: Dataplane, want: Snapshot) -> Live:
    live = dataplane.read()
    for step in plan(live, want, SEED, dataplane.now_ns() // 10**9):
        dataplane.apply(step)
        live = advance(live, step)
    return live


def churn(directory: Path, seed: int) -> None:
    """Runs in the process that is killed."""
    rng = random.Random(seed)
    with Kernel(directory) as kernel:
        while True:
            reach(kernel, random_want(rng))


def owners(live: Live) -> dict[VipKey, list[IPv4Address | None]]:
    return {key: [owner for owner, _, _ in slots] for key, slots in view(live).items()}


def settle(kernel: Kernel, want: Snapshot) -> Live:
    """As if all had been quiet for long."""
    live = kernel.read()
    later_ns = kernel.now_ns() + 3600 * 10**9
    table = kernel.records()
    numbers = {v.number: 1 for v in live.vips.values()}
    for step in sweep(live, table.keys, table.values, table.count, numbers, later_ns).steps:
        kernel.apply(step)
    live = replace(kernel.read(), records={})
    for step in plan(live, want, SEED, later_ns // 10**9):
        kernel.apply(step)
    return kernel.read()


@pytest.mark.parametrize("seed", range(KILLS))
def test_an_apply_killed_anywhere_is_finished_by_the_next_start(balancer: Loaded, seed: int) -> None:
    rng = random.Random(1000 + seed)
    directory = balancer.pinned.directory
    with Kernel(directory) as kernel:
        reach(kernel, random_want(rng))
        doomed = FORK.Process(target=churn, args=(directory, seed))
        doomed.start()
        end = time.monotonic() + rng.uniform(0.005, 0.1)
        for n in itertools.count():
            flow = Flow(IPv4Address("10.64.0.0") + n % 5000, VIP, 1024 + n % 1000, 80, Proto.TCP)
            outcome = balancer.run(frame(flow, SYN if n % 2 else ACK))
            assert outcome.verdict == libbpf.XDP_TX, f"packet {n} was dropped: {outcome.drops}"
            if n >= 20 and time.monotonic() > end:
                break
        doomed.kill()
        doomed.join()
        judge(kernel.read())
        final = random_want(rng)
    with Kernel(directory) as kernel:  # the next start
        found = reach(kernel, final)
        expected = reach(Fake(CAPACITY), final)
        small = {v.keys[0]: 1 << v.ring_bits for v in final.vips}
        for key, want in owners(expected).items():
            have = owners(found)[key]
            stretch = len(have) // small[key]
            assert have == [owner for owner in want for _ in range(stretch)]
        for _ in range(3):
            live = settle(kernel, final)
        assert owners(live) == owners(expected)
        assert len(live.rings) == len(final.vips)
        used = [real for real in live.reals.values() if real.state is not RealState.FREE]
        assert len(used) <= sum(b.duty is not Duty.DEAD for v in final.vips for b in v.backends)
        for step in plan(live, Snapshot(), SEED, 0):
            kernel.apply(step)
