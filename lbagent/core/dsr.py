"""What a backend needs for direct server return, and the steps to it from what it has.

A client's packet reaches the server as it was sent, so the VIP must be an address of this host; it must not
be answered for by ARP, as it is everyone's; and the way back need not be the way it came. What the agent
changes it notes in a `Record`, which is all that is needed to take it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import NamedTuple, assert_never

from lbagent.core.options import Options, parse

# Documentation/networking/ip-sysctl.rst; in force is the higher of `all` and the device's own value
RP_STRICT, RP_LOOSE = 1, 2
ARP_IGNORE = 1  # answer only for addresses of the device that was asked
ARP_ANNOUNCE = 2  # ask in the name of an address of the device that asks


@dataclass(frozen=True, slots=True)
class Node:
    """What there is. addresses: on the loopback device; told: those the program takes packets for; sysctls:
    by key under net.ipv4.conf, as "all/arp_ignore"; attached: devices that run our program, and of those that
    are to keep it only the ones that run the latest."""

    addresses: frozenset[IPv4Address]
    told: frozenset[IPv4Address]
    sysctls: Mapping[str, int]
    attached: frozenset[str]


class Change(NamedTuple):
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Record:
    """What the agent changed and has not taken back; what was there before it came is not in it."""

    addresses: frozenset[IPv4Address] = frozenset()
    sysctls: Mapping[str, Change] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SetSysctl:
    key: str
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Attach:
    device: str


@dataclass(frozen=True, slots=True)
class Detach:
    device: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Let the program take packets for the address out of their tunnel."""

    address: IPv4Address


@dataclass(frozen=True, slots=True)
class Untell:
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class AddAddress:
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class DelAddress:
    address: IPv4Address


Action = SetSysctl | Attach | Detach | Tell | Untell | AddAddress | DelAddress


def keys(devices: Iterable[str]) -> list[str]:
    """The sysctls to look at."""
    filters = (f"{device}/rp_filter" for device in sorted(devices))
    return ["all/arp_ignore", "all/arp_announce", "all/rp_filter", *filters]


def needs(sysctls: Mapping[str, int], devices: Iterable[str]) -> dict[str, int]:
    """The sysctls that have to change. A value that is stricter, or a filter that is off, stays as it is."""
    found: dict[str, int] = {}
    if sysctls["all/arp_ignore"] < ARP_IGNORE:
        found["all/arp_ignore"] = ARP_IGNORE
    if sysctls["all/arp_announce"] < ARP_ANNOUNCE:
        found["all/arp_announce"] = ARP_ANNOUNCE
    for device in sorted(devices):
        if max(sysctls["all/rp_filter"], sysctls[f"{device}/rp_filter"]) == RP_STRICT:
            found[f"{device}/rp_filter"] = RP_LOOSE
    return found


def plan(node: Node, record: Record, vips: frozenset[IPv4Address], devices: frozenset[str]) -> list[Action]:
    """From what there is to what is wanted. ARP is silenced before an address comes, and an address that
    goes is off the device before its packets stop being taken out."""
    steps: list[Action] = []
    steps += (SetSysctl(key, node.sysctls[key], new) for key, new in needs(node.sysctls, devices).items())
    steps += (Attach(device) for device in sorted(devices - node.attached))
    steps += (Tell(address) for address in sorted(vips - node.told))
    steps += (AddAddress(address) for address in sorted(vips - node.addresses))
    steps += (DelAddress(address) for address in sorted((record.addresses - vips) & node.addresses))
    steps += (Untell(address) for address in sorted(node.told - vips))
    gone = record.devices - devices
    steps += (Detach(device) for device in sorted(gone & node.attached))
    steps += _restore(node, {k: c for k, c in record.sysctls.items() if k.split("/")[0] in gone})
    return steps


def undo(node: Node, record: Record) -> list[Action]:
    """Back to what was. What somebody else changed meanwhile is left as they want it."""
    steps: list[Action] = []
    steps += (DelAddress(address) for address in sorted(record.addresses & node.addresses))
    steps += (Untell(address) for address in sorted(node.told))
    steps += (Detach(device) for device in sorted(record.devices & node.attached))
    steps += _restore(node, record.sysctls)
    return steps


def _restore(node: Node, changes: Mapping[str, Change]) -> list[Action]:
    still = {key: change for key, change in changes.items() if node.sysctls.get(key) == change.new}
    return [SetSysctl(key, change.new, change.old) for key, change in sorted(still.items())]


def note(record: Record, action: Action) -> Record:
    """The record once the action is done."""
    match action:
        case SetSysctl(key, old, new):
            first = record.sysctls[key].old if key in record.sysctls else old
            others = {k: change for k, change in record.sysctls.items() if k != key}
            return replace(record, sysctls=others if new == first else others | {key: Change(first, new)})
        case Attach(device):
            return replace(record, devices=record.devices | {device})
        case Detach(device):
            return replace(record, devices=record.devices - {device})
        case AddAddress(address):
            return replace(record, addresses=record.addresses | {address})
        case DelAddress(address):
            return replace(record, addresses=record.addresses - {address})
        case Tell() | Untell():
            return record
        case _:
            assert_never(action)


def takes_back(record: Record, action: Action) -> bool:
    """Whether the record shrinks by it: then it is written after the deed, else before. So it never lacks a
    change that was made."""
    after = note(record, action)
    return (
        after.addresses < record.addresses
        or after.devices < record.devices
        or after.sysctls.keys() < record.sysctls.keys()
    )


# ---- which VIPs, and how long -------------------------------------------------------------------


class Registration(NamedTuple):
    """An opted-in instance on this node, as it stands in Consul."""

    service: str
    id: str
    port: int
    tags: tuple[str, ...]
    meta: Mapping[str, str]


class Asked(NamedTuple):
    """What the registrations ask for. vips: VIP -> how long it lingers, s; options: by id, the last that made
    sense; problems: by id, why it was not understood."""

    vips: Mapping[IPv4Address, float]
    options: Mapping[str, Options]
    problems: Mapping[str, tuple[str, ...]]


def asked(registrations: Iterable[Registration], before: Mapping[str, Options], linger_s: float) -> Asked:
    """One that makes no sense asks for what it asked for when it last did."""
    options: dict[str, Options] = {}
    problems: dict[str, tuple[str, ...]] = {}
    for service, id_, port, tags, meta in registrations:
        found = parse(meta, tags, port)
        if isinstance(found, Options):
            options[id_] = found
        else:
            problems[id_] = tuple(f"{service}: {error}" for error in found)
            if id_ in before:
                options[id_] = before[id_]
    vips: dict[IPv4Address, float] = {}
    for wish in options.values():
        mine = linger_s if wish.linger_s is None else wish.linger_s
        vips[wish.vip] = max(mine, vips.get(wish.vip, 0.0))
    return Asked(vips, options, problems)


class Lease(NamedTuple):
    """A VIP of an instance on this node. gone_at: when the last one went, None while there is one."""

    linger_s: float
    gone_at: float | None


def renew(
    leases: Mapping[IPv4Address, Lease], present: Mapping[IPv4Address, float], at: float
) -> dict[IPv4Address, Lease]:
    """The leases after an answer, or a while later. present: VIP -> how long it lingers once it is gone."""
    found = {address: Lease(linger_s, None) for address, linger_s in present.items()}
    for address, lease in leases.items():
        if address not in present:
            gone_at = at if lease.gone_at is None else lease.gone_at
            if gone_at + lease.linger_s > at:
                found[address] = lease._replace(gone_at=gone_at)
    return found


def next_end(leases: Mapping[IPv4Address, Lease]) -> float | None:
    """When the first lease ends, if nothing else happens."""
    return min((x.gone_at + x.linger_s for x in leases.values() if x.gone_at is not None), default=None)
