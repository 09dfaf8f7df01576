"""What Consul answers, reduced to what is needed; anything that does not fit is nonsense."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

import msgspec

from lbagent.consul.client import Answer
from lbagent.core.instances import Instance
from lbagent.core.options import META_PREFIX, is_option
from lbagent.core.status import Standing
from lbagent.errors import ConsulError

T = TypeVar("T")
Catalog = dict[str, tuple[str, ...]]  # of /v1/catalog/services: name -> tags of all instances
Weight = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class _Weights(msgspec.Struct, frozen=True, rename="pascal"):
    passing: Weight = 1
    warning: Weight = 1


class _Service(msgspec.Struct, frozen=True, rename="pascal"):
    id: str = msgspec.field(name="ID")
    service: str
    port: int
    address: str = ""
    tags: tuple[str, ...] | None = None
    meta: dict[str, str] | None = None
    weights: _Weights | None = None

    def options(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Tags and Meta, reduced to what is meant for us."""
        meta = {key: value for key, value in (self.meta or {}).items() if key.startswith(META_PREFIX)}
        return tuple(sorted(filter(is_option, self.tags or ()))), meta


class _Node(msgspec.Struct, frozen=True, rename="pascal"):
    node: str
    address: str


class Check(msgspec.Struct, frozen=True, rename="pascal"):
    check_id: str = msgspec.field(name="CheckID")
    status: Literal["passing", "warning", "critical"]


class Entry(msgspec.Struct, frozen=True, rename="pascal"):
    """Of /v1/health/service: an instance with its node and all checks that concern it."""

    node: _Node
    service: _Service
    checks: tuple[Check, ...]


class NodeServices(msgspec.Struct, frozen=True, rename="pascal"):
    """Of /v1/catalog/node."""

    services: dict[str, _Service]


class _AgentConfig(msgspec.Struct, frozen=True, rename="pascal"):
    node_name: str


class Self(msgspec.Struct, frozen=True, rename="pascal"):
    """Of /v1/agent/self."""

    config: _AgentConfig


def decode(answer: Answer, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except msgspec.DecodeError as error:
        raise ConsulError(f"nonsense: {error}") from error


def instance(entry: Entry) -> Instance:
    service, weights = entry.service, entry.service.weights or _Weights()
    tags, meta = service.options()
    return Instance(
        entry.node.node,
        service.id,
        service.address or entry.node.address,
        service.port,
        tags,
        meta,
        weights.passing,
        weights.warning,
        standing(service.id, entry.checks),
    )


def standing(service_id: str, checks: Iterable[Check]) -> Standing:
    """Maintenance is Consul's own critical check; it says more than the others."""
    maintenance = ("_node_maintenance", f"_service_maintenance:{service_id}")
    found = Standing.PASSING
    for check in checks:
        if check.status == "critical":
            if check.check_id in maintenance:
                return Standing.MAINTENANCE
            found = Standing.CRITICAL
        elif check.status == "warning" and found is Standing.PASSING:
            found = Standing.WARNING
    return found


def catalog_of(answer: Answer) -> Catalog:
    """A real list holds at least Consul's servers: else the token may read nothing, or they lost all."""
    catalog = decode(answer, Catalog)
    if not catalog:
        raise ConsulError("the list of services is empty: may the token read services and nodes?")
    return catalog
