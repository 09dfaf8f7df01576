"""What is wanted and what is live become the one report that operators see (core/status.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from lbagent.core import ring, slots
from lbagent.core.desired import BackendView, Desired, ServiceView
from lbagent.core.model import Duty, Hop, Live, RingId, claimant
from lbagent.core.plan import members, reals_by_vip
from lbagent.core.status import BackendStatus, ServiceStatus

Traffic = Mapping[int, tuple[int, int]]  # packets and bytes by number


@dataclass(frozen=True, slots=True)
class Measured:
    """What the kernel counted. records: live flow records by real number, as of the latest sweep. devices:
    name by ifindex."""

    records: Mapping[int, int]
    vips: Traffic
    reals: Traffic
    devices: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Table:
    """What is live for one VIP: real numbers by address, and how many slots name them as owner and elder."""

    reals: Mapping[IPv4Address, int]
    owners: Mapping[int, int]
    elders: Mapping[int, int]


def report(desired: Desired, live: Live, measured: Measured, seed: int) -> tuple[ServiceStatus, ...]:
    """One status for each service that is known."""
    vips = {vip.claimant: vip for vip in live.vips.values()}
    reals = reals_by_vip(live)
    found: list[ServiceStatus] = []
    for view in desired.services:
        vip = vips.get(claimant(view.name))
        if vip is None:
            found.append(_service(view, live, measured, seed, Table({}, {}, {}), (0, 0)))
        else:
            owners, elders = slots.census(live.rings[RingId(vip.number, vip.ring_bits)])
            table = Table(reals.get(vip.number, {}), owners, elders)
            found.append(_service(view, live, measured, seed, table, measured.vips.get(vip.number, (0, 0))))
    return tuple(found)


def _service(
    view: ServiceView, live: Live, measured: Measured, seed: int, table: Table, traffic: tuple[int, int]
) -> ServiceStatus:
    vip = view.vip
    digest = ring.digest(members(vip.backends), vip.ring_bits, seed) if vip else ""
    return ServiceStatus(
        name=view.name,
        vips=vip.keys if vip else (),
        serving=vip is not None and any(key in live.vips for key in vip.keys),
        ring_size=1 << vip.ring_bits if vip else 0,
        ring_digest=digest,
        backends=tuple(_backend(backend, live, measured, table) for backend in view.backends),
        problems=view.problems,
        packets=traffic[0],
        bytes=traffic[1],
        answer_at=view.answer_at,
    )


def _backend(view: BackendView, live: Live, measured: Measured, table: Table) -> BackendStatus:
    """Without a number it never served: it is empty. With one, a swap since the sweep leaves that open."""
    wanted = view.backend
    number = table.reals.get(wanted.address, 0) if wanted else 0
    held, former = table.owners.get(number, 0), table.elders.get(number, 0)
    records = measured.records.get(number, 0)
    packets, size = measured.reals.get(number, (0, 0))
    if not number:
        held = former = records = 0
    takes_new = wanted is not None and wanted.duty is Duty.ACTIVE and wanted.share > 0
    is_known = not number or live.records is not None
    return BackendStatus(
        node=view.node,
        id=view.id,
        address=view.address,
        port=view.port,
        standing=view.standing,
        weight=view.weight,
        slots=held,
        former_slots=former,
        records=records,
        empty=is_known and not (takes_new or held or former or records),
        hop=_way(wanted.hop, measured.devices) if wanted and wanted.hop else None,
        packets=packets,
        bytes=size,
        reason=view.reason,
        since=view.since,
        problems=view.problems,
    )


def _way(hop: Hop, devices: Mapping[int, str]) -> str:
    return f"{hop.dmac.hex(':')} dev {devices.get(hop.ifindex, hop.ifindex)}"
