"""The command line's way to the agent: HTTP over its unix socket, with nothing that takes long to import."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from lbagent.errors import LbAgentError

ANSWER_S = 40.0  # longer than the agent takes to apply a change or to say that it cannot


class Unreachable(LbAgentError):
    """Nobody answers there: the agent does not run, or we may not ask it."""


class Refused(LbAgentError):
    """The agent answered that it will not, or cannot."""

    def __init__(self, error: str, allowed: object = None) -> None:
        texts = (
            [str(one) for one in allowed] if isinstance(allowed, list) else [str(allowed)] if allowed else []
        )
        super().__init__(f"{error}; allowed: {', '.join(texts)}" if texts else error)


@dataclass(frozen=True, slots=True)
class Client:
    """Answers are the API's JSON, as docs/api.md tells."""

    path: Path

    def status(self) -> Any:
        return self.ask("GET", "/v1/status")

    def drain(
        self, service: str, node: str, instance: str, reason: str | None, wait: str, wait_s: float
    ) -> Any:
        query = {"wait": wait} | ({} if reason is None else {"reason": reason})
        path = f"{_backend(service, node, instance)}/drain?{urlencode(query)}"
        return self.ask("POST", path, wait_s + ANSWER_S)

    def undrain(self, service: str, node: str, instance: str) -> Any:
        return self.ask("POST", f"{_backend(service, node, instance)}/undrain")

    def ask(self, method: str, path: str, deadline_s: float = ANSWER_S) -> Any:
        """Raises Unreachable or Refused."""
        connection = _UnixConnection(self.path, deadline_s)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            text = response.read()
            answer = json.loads(text)
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(f"no answer from the agent at {self.path}: {why}") from error
        except ValueError as error:
            raise Unreachable(f"{self.path}: what answers there is not the agent") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise Refused(str(answer.get("error", response.reason)), answer.get("allowed"))
        return answer


def _backend(service: str, node: str, instance: str) -> str:
    service, node, instance = (quote(part, safe="") for part in (service, node, instance))
    return f"/v1/services/{service}/backends/{node}/{instance}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, deadline_s: float) -> None:
        super().__init__("agent", timeout=deadline_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
