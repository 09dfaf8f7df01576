"""What the agent tells operators: one immutable report, made after each change of the world."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from lbagent.core.model import VipKey


class Standing(enum.StrEnum):
    """Why a backend has the duty it has, in the operator's words."""

    PASSING = "passing"
    WARNING = "warning"
    CRITICAL = "critical"
    MAINTENANCE = "maintenance"
    DRAINED = "drained"  # by an operator
    GONE = "gone"  # deregistered, or no longer opted in; lingers
    ADOPTED = "adopted"  # found in the kernel at the start; Consul has not spoken of it yet
    REFUSED = "refused"  # its registration makes no sense here, see problems


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """node and id: the Consul instance ("" for one that only the kernel still knows).

    slots: ring slots that send new connections to it. former_slots: slots that it owned and that have
    not settled. records: live flow records that name it, as of the latest sweep. empty: it owns no slot,
    its former slots have settled and no live record names it; always False while it may get connections.
    """

    node: str
    id: str
    address: str
    port: int
    standing: Standing
    weight: int
    slots: int
    former_slots: int
    records: int
    empty: bool
    hop: str | None  # "02:..:01 dev eth0", None: unknown
    packets: int = 0
    bytes: int = 0
    reason: str = ""  # of the drain
    since: float = 0.0  # of the drain, Unix time
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """serving: the kernel forwards for it. ring_digest: equal on all nodes that want the same."""

    name: str
    vips: tuple[VipKey, ...]
    serving: bool
    ring_size: int
    ring_digest: str
    backends: tuple[BackendStatus, ...]
    problems: tuple[str, ...]
    packets: int = 0
    bytes: int = 0
    answer_at: float = 0.0  # Unix time of Consul's last good answer on it; 0: never


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    name: str
    mode: str  # native, generic or detached


@dataclass(frozen=True, slots=True)
class Status:
    """ready: attached, and Consul's first full answer is applied."""

    ready: bool
    version: str
    program: str  # digest
    adopted: bool  # the program was found running when the agent started
    started_at: float
    applied_at: float  # Unix time of the latest change of the kernel's tables
    applies: int
    apply_errors: int
    consul_answer_at: float  # Unix time of the latest good answer of the list of services
    consul_errors: int
    devices: tuple[DeviceStatus, ...] = ()
    services: tuple[ServiceStatus, ...] = ()
    drops: dict[str, int] = field(default_factory=dict)
    flow_records: int = 0
    problems: tuple[str, ...] = ()
