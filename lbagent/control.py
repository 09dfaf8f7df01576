"""What the operator's side may ask of the agent; admin.py is written against this, agent.py keeps it."""

from __future__ import annotations

from typing import Protocol

from lbagent.core.status import Status


class Control(Protocol):
    def status(self) -> Status:
        """The latest report."""

    async def refreshed(self) -> Status:
        """A report of now: made after a fresh sweep of flow records and counters."""

    async def drain(self, service: str, node: str, instance: str, reason: str, /) -> None:
        """Returns once it is kept on disk and applied to the kernel. instance: its id in Consul.

        Raises NotFound."""

    async def undrain(self, service: str, node: str, instance: str, /) -> None:
        """As `drain`."""

    async def changed(self, after: Status) -> Status:
        """Waits, without a deadline, for a report newer than this one."""
