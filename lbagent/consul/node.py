"""The opted-in instances that are registered on one node, for the helper that makes it fit to serve them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lbagent.consul.client import ANSWER_S, Access, Answer, Connect, Reader, connect, read, read_consistent
from lbagent.consul.watch import CONFIRM_S, Pace, watch
from lbagent.consul.words import NodeServices, Self, decode
from lbagent.core.dsr import Registration
from lbagent.errors import ConsulError


@dataclass(slots=True)
class NodeWatcher:
    """Follows the opted-in instances that are registered on one node. node: None: that of the asked agent."""

    access: Access
    node: str | None = None
    pace: Pace = field(default_factory=Pace)
    connect: Connect = connect
    _last: tuple[Registration, ...] | None = None

    async def run(self, emit: Callable[[tuple[Registration, ...]], None]) -> None:
        """Until cancelled; emits what changed. Failures are logged and change nothing."""
        async with self.connect(self.access) as reader:

            async def ask(index: int) -> Answer:
                return await read(reader, await self._path(reader), index, self.access.wait)

            async def take(answer: Answer) -> bool:
                found = await self._believed(reader, answer)
                if found == self._last:
                    return False
                self._last = found
                emit(found)
                return True

            await watch(ask, take, lambda error: None, self.pace, "services of this node")

    async def _path(self, reader: Reader) -> str:
        if self.node is None:
            self.node = decode(await reader.read("/v1/agent/self", {}, ANSWER_S), Self).config.node_name
        return f"/v1/catalog/node/{self.node}"

    async def _believed(self, reader: Reader, answer: Answer) -> tuple[Registration, ...]:
        found = self._opted_in(answer)
        if answer.filtered and len(found) < len(self._last or ()):
            raise ConsulError("fewer instances, but the answer is filtered by ACLs")
        if not found and self._last != ():
            await self.pace.sleep(CONFIRM_S)
            again = await read_consistent(reader, await self._path(reader))
            if self._opted_in(again):
                raise ConsulError("one answer lacks the node's instances, another has them")
        return found

    def _opted_in(self, answer: Answer) -> tuple[Registration, ...]:
        node = decode(answer, NodeServices | None)  # type: ignore[arg-type]  # a union is a type for msgspec
        if node is None:
            raise ConsulError(f"node {self.node} is not known: is its agent up, may the token read it?")
        return tuple(
            Registration(s.service, s.id, s.port, *s.options())
            for s in sorted(node.services.values(), key=lambda s: s.id)
            if self.access.tag in (s.tags or ())
        )
