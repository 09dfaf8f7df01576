"""The errors of lbagent, one class for each thing the caller should do about it, and how to unpack them."""

from __future__ import annotations

from collections.abc import Iterator


class LbAgentError(Exception):
    """Any error that lbagent raises on purpose."""


class ConfigError(LbAgentError):
    """Refuse to start: the message names the key, the value and what is allowed."""


class ConsulError(LbAgentError):
    """Wait and ask again: Consul gave no answer that may be believed. State stays as it is."""


class DataplaneError(LbAgentError):
    """Read back what the kernel holds and try again. Keeps errno (0 if none) and the map or device."""

    def __init__(self, what: str, errno: int = 0) -> None:
        super().__init__(what)
        self.errno = errno


class LinkError(LbAgentError):
    """A network device or route is not as asked: missing, or the kernel refused it."""


class InconsistentSnapshot(LbAgentError):
    """Keep the last good state: what was wanted, or a step towards it, contradicts itself."""


class NotFound(LbAgentError):
    """The operator named a service or backend that is not there."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors that a task group ended with, or groups within groups; what is no group, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
