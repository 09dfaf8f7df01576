"""The data planes under contract: the fake everywhere, the kernel where there is one to be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from lbagent.core.model import ClearReals, RealState, Snapshot
from lbagent.core.plan import plan
from lbagent.dataplane import Dataplane, libbpf
from lbagent.dataplane.fake import Fake
from lbagent.dataplane.kernel import Kernel
from tests.loaded import loaded
from tests.snapshots import CAPACITY, SEED


@dataclass
class Subject:
    dataplane: Dataplane
    flows_fd: int | None  # of the kernel's flow table

    def put_flows(self, flows: Mapping[bytes, bytes]) -> None:
        """As packets would."""
        if self.flows_fd is None:
            assert isinstance(self.dataplane, Fake)
            self.dataplane.flows.update(flows)
            return
        libbpf.map_update_batch(self.flows_fd, b"".join(flows), b"".join(flows.values()), len(flows))

    def clear(self) -> None:
        """Back to empty by the protocol's own means; generations stay."""
        live = self.dataplane.read()
        for step in plan(live, Snapshot(), SEED, 0):
            self.dataplane.apply(step)
        used = tuple(n for n, real in live.reals.items() if real.state is not RealState.FREE)
        self.dataplane.apply(ClearReals(used))


@pytest.fixture(scope="session")
def kernel_subject() -> Iterator[Subject]:
    with loaded(CAPACITY) as balancer, Kernel(balancer.pinned.directory) as kernel:
        yield Subject(kernel, balancer.maps["flows"])


@pytest.fixture(params=["fake", pytest.param("kernel", marks=pytest.mark.kernel)])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "fake":
        return Subject(Fake(CAPACITY), None)
    found: Subject = request.getfixturevalue("kernel_subject")
    found.clear()
    assert found.flows_fd is not None
    libbpf.map_delete_keys(found.flows_fd, list(libbpf.map_keys(found.flows_fd)))
    return found
