"""The instances of one service: which options count, who can be a backend, what is wrong with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address

from lbagent.core.options import Options, parse, unusable
from lbagent.core.status import Standing

InstanceKey = tuple[str, str]  # node, id
HEALTHIEST_FIRST = (Standing.PASSING, Standing.WARNING, Standing.MAINTENANCE, Standing.CRITICAL)


@dataclass(frozen=True, slots=True)
class Instance:
    """One opted-in registration of a service. address: as registered, the node's when that was empty.

    standing: PASSING, WARNING, CRITICAL or MAINTENANCE.
    """

    node: str
    id: str
    address: str
    port: int
    tags: tuple[str, ...]
    meta: Mapping[str, str]
    weight_passing: int
    weight_warning: int
    standing: Standing

    @property
    def key(self) -> InstanceKey:
        return self.node, self.id


@dataclass(frozen=True, slots=True)
class Departed:
    """An address that no instance has any more. The instance is as it was last, node and id "" if unknown."""

    instance: Instance
    at: float


@dataclass(frozen=True, slots=True)
class Service:
    """options: the last good ones. speakers: the instances that are backends; the others are refused.

    doubts: what is wrong with an instance's registration, if anything. problem: with all of them.
    """

    instances: tuple[Instance, ...] = ()
    options: Options | None = None
    speakers: Mapping[IPv4Address, Instance] = field(default_factory=dict)
    doubts: Mapping[InstanceKey, tuple[str, ...]] = field(default_factory=dict)
    problem: str = ""
    departed: Mapping[IPv4Address, Departed] = field(default_factory=dict)
    answer_at: float = 0.0  # 0: never
    error: str = ""  # of Consul, since the last good answer


def judge(instances: Iterable[Instance], fallback: Options | None) -> Service:
    """What the instances of a service amount to.

    Its options are the most common valid ones; of equally common ones, those of the lowest instance; if none
    is valid, `fallback`. Of instances with one address the healthiest speaks.
    """
    sorted_ = tuple(sorted(instances, key=lambda i: i.key))
    asked = _ask(sorted_)
    votes = Counter(options for options in asked.values() if isinstance(options, Options))
    options = votes.most_common(1)[0][0] if votes else fallback  # of equals, the first counted
    problem = ""
    if asked and not votes:
        problem = "no instance has valid options: " + (
            "the last good ones stay" if fallback else "so it has no VIP"
        )
    doubts: dict[InstanceKey, tuple[str, ...]] = {}
    speakers: dict[IPv4Address, Instance] = {}
    for instance in sorted(sorted_, key=lambda i: HEALTHIEST_FIRST.index(i.standing)):
        wish = asked[instance.key]
        found = [] if isinstance(wish, Options) else list(wish)
        if isinstance(wish, Options) and wish != options:
            found.append("its options differ from those that count, which most instances have")
        if options is not None:
            address = _address(instance)
            why = _refusal(instance, address, wish, options)
            if address is not None and not why:
                speaker = speakers.setdefault(address, instance)
                if speaker is not instance:
                    why = f"{speaker.id} on {speaker.node} has the same address and speaks for it"
            found += [why] if why else []
        if found:
            doubts[instance.key] = tuple(found)
    return Service(sorted_, options, speakers, doubts, problem)


def _ask(instances: Iterable[Instance]) -> dict[InstanceKey, Options | tuple[str, ...]]:
    """Each instance's own options or errors; most are alike, and parsed once."""
    parsed: dict[tuple[object, ...], Options | tuple[str, ...]] = {}
    found: dict[InstanceKey, Options | tuple[str, ...]] = {}
    for i in instances:
        text = (frozenset(i.meta.items()), i.tags, i.port)
        if text not in parsed:
            parsed[text] = parse(i.meta, i.tags, i.port)
        found[i.key] = parsed[text]
    return found


def _address(instance: Instance) -> IPv4Address | None:
    try:
        return IPv4Address(instance.address)
    except AddressValueError:
        return None


def _refusal(
    instance: Instance, address: IPv4Address | None, asked: Options | tuple[str, ...], options: Options
) -> str:
    """Why the instance cannot be a backend; "" when it can."""
    if address is None:
        return f'its address "{instance.address}" is no IPv4 address'
    if why := unusable(address):
        return f"its address {address} {why}"
    if address == options.vip:
        return f"its address {address} is the VIP itself"
    if instance.port != options.port:
        return f"its port {instance.port} is not the VIP's port {options.port}"
    if isinstance(asked, Options) and asked.vip != options.vip:
        return f"it asks for VIP {asked.vip}, not for {options.vip}"
    return ""
