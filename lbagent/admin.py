"""The HTTP API for operators: on a unix socket, and on TCP for those who have the token.

Owns sockets, routes, strict reading of requests and the shape of answers; what is asked for is done by a
Control. Answers are JSON; an error is {"error": what was wrong, "allowed": what would be right}.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import structlog
from aiohttp import web

from lbagent import metrics
from lbagent.config import Admin
from lbagent.control import Control
from lbagent.core.model import VipKey
from lbagent.core.options import duration_s
from lbagent.core.status import BackendStatus, ServiceStatus, Standing, Status
from lbagent.errors import ConfigError, LbAgentError, NotFound
from lbagent.listen import UnixSite, unix_listener

BODY_BYTES = 16 << 10
BODY_S = 5.0  # a client that sends slower is cut off
STOP_S = 2.0  # requests under way get this long when the server stops
LONGEST_WAIT_S = 3600
LONGEST_REASON = 500
OPEN_PATHS = ("/healthz", "/readyz")  # for load balancers and probes, which have no token
BACKEND = "/v1/services/{service}/backends/{node}/{id:.+}"  # an id may hold slashes, escaped or not

log = structlog.get_logger()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


async def serve(config: Admin, control: Control) -> None:
    """Serve until cancelled; then held answers are given at once. Raises ConfigError if it cannot listen."""
    api = Api(control)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(unix_listener(config.socket, config.socket_group))
        runner = await stack.enter_async_context(_runner(api, None))
        await UnixSite(runner, listener).start()
        log.info("admin_listens", socket=str(config.socket))
        if config.address is not None:
            guarded = await stack.enter_async_context(_runner(api, _token(config)))
            where = urlsplit(f"//{config.address}")
            try:
                await web.TCPSite(guarded, where.hostname, where.port).start()
            except OSError as error:
                raise ConfigError(f"admin.address {config.address}: {error.strerror or error}") from error
            log.info("admin_listens", address=str(config.address))
        stack.callback(api.stop)
        await asyncio.get_running_loop().create_future()


# ---- what may be asked --------------------------------------------------------------------------


class _Refusal(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, error: str, allowed: object = None) -> None:
        super().__init__(error)
        self.status = status
        self.allowed = allowed


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    reason: Annotated[str, msgspec.Meta(max_length=LONGEST_REASON)] | None = None


@dataclass(slots=True)
class Api:
    """The handlers. held: time limits of the answers that are being held back."""

    control: Control
    held: set[asyncio.Timeout] = field(default_factory=set)
    is_stopping: bool = False

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/status", self.status),
            web.get("/v1/services", self.services),
            web.get("/v1/services/{service}", self.service),
            web.post(f"{BACKEND}/drain", self.drain),
            web.post(f"{BACKEND}/undrain", self.undrain),
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics),
        ]

    def stop(self) -> None:
        """From now on no answer is held back."""
        self.is_stopping = True
        now = asyncio.get_running_loop().time()
        for limit in self.held:
            limit.reschedule(now)

    async def status(self, request: web.Request) -> web.Response:
        _query(request)
        status = self.control.status()
        services = [_service(service) for service in status.services]
        return _json({**msgspec.to_builtins(replace(status, services=())), "services": services})

    async def services(self, request: web.Request) -> web.Response:
        _query(request)
        return _json({"services": [_service(service) for service in self.control.status().services]})

    async def service(self, request: web.Request) -> web.Response:
        _query(request)
        name, status = request.match_info["service"], self.control.status()
        for service in status.services:
            if service.name == name:
                return _json(_service(service))
        raise _Refusal(404, f"no service {name}", [service.name for service in status.services])

    async def drain(self, request: web.Request) -> web.Response:
        """A repeated one keeps the reason, unless it brings another."""
        query = _query(request, "wait", "reason")
        wait_s, reason = _wait_s(query.get("wait", "0s")), await _reason(request, query)
        target = _Target.of(request)
        if reason is None:
            backend = target.find(self.control.status())
            reason = backend.reason if backend is not None else ""
        with target.explained(self.control):
            await self.control.drain(target.service, target.node, target.id, reason)
        return await self._until_empty(request, target, wait_s)

    async def undrain(self, request: web.Request) -> web.Response:
        _query(request)
        target = _Target.of(request)
        with target.explained(self.control):
            await self.control.undrain(target.service, target.node, target.id)
        backend = target.find(await self.control.refreshed())
        return _json(target.told(backend or _gone(target)))

    async def healthz(self, request: web.Request) -> web.Response:
        _query(request)
        return _json({"alive": True})

    async def readyz(self, request: web.Request) -> web.Response:
        _query(request)
        status = self.control.status()
        if status.ready:
            return _json({"ready": True})
        return _json({"ready": False, "error": "not ready", "why": _why_not(status)}, 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """Rendered on a thread: a thousand backends take 60 ms."""
        _query(request)
        text = await asyncio.to_thread(metrics.render, self.control.status(), time.time())
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _until_empty(self, request: web.Request, target: _Target, wait_s: float) -> web.Response:
        """`ended` tells which: empty, timeout, or stopping when the agent ends before the time is up."""
        clock = asyncio.get_running_loop().time
        began = clock()
        backend = target.must_find(status := await self.control.refreshed())
        limit = asyncio.timeout(0 if self.is_stopping else wait_s)
        ended = "empty"
        try:
            async with limit:
                self.held.add(limit)
                while not backend.empty and _is_there(request):
                    if backend.standing not in (Standing.DRAINED, Standing.GONE):
                        raise _Refusal(409, f"{target} was undrained meanwhile")
                    status = await self.control.changed(status)
                    backend = target.must_find(status)
        except TimeoutError:
            if not limit.expired():
                raise
            ended = "stopping" if self.is_stopping else "timeout"
        finally:
            self.held.discard(limit)
        return _json({**target.told(backend), "ended": ended, "waited_s": round(clock() - began, 3)})


@dataclass(frozen=True, slots=True)
class _Target:
    """The backend that a request names."""

    service: str
    node: str
    id: str

    @classmethod
    def of(cls, request: web.Request) -> _Target:
        return cls(*(request.match_info[part] for part in ("service", "node", "id")))

    def __str__(self) -> str:
        return f"backend {self.node}/{self.id} of service {self.service}"

    def find(self, status: Status) -> BackendStatus | None:
        backends = [
            b for service in status.services if service.name == self.service for b in service.backends
        ]
        return next((b for b in backends if (b.node, b.id) == (self.node, self.id)), None)

    def must_find(self, status: Status) -> BackendStatus:
        backend = self.find(status)
        if backend is None:
            raise _Refusal(404, f"{self} is not there any more", self.known(status))
        return backend

    def known(self, status: Status) -> list[str]:
        """What there is in its place: backends of the service, or services."""
        services = {service.name: service.backends for service in status.services}
        if self.service not in services:
            return sorted(services)
        return [f"{b.node}/{b.id}" for b in services[self.service] if b.id]

    @contextlib.contextmanager
    def explained(self, control: Control) -> Iterator[None]:
        try:
            yield
        except NotFound as error:
            raise _Refusal(404, str(error), self.known(control.status())) from error

    def told(self, backend: BackendStatus) -> dict[str, object]:
        return {"service": self.service, **msgspec.to_builtins(backend)}


def _gone(target: _Target) -> BackendStatus:
    return BackendStatus(target.node, target.id, "", 0, Standing.GONE, 0, 0, 0, 0, True, None)


def _is_there(request: web.Request) -> bool:
    """Whether the client still waits for its answer."""
    return request.transport is not None and not request.transport.is_closing()


def _why_not(status: Status) -> list[str]:
    why = [f"{device.name}: no program is attached" for device in status.devices if device.mode == "detached"]
    if not status.consul_answer_at:
        why.append("Consul has not answered yet")
    return [*why, *status.problems] or ["the first full answer from Consul is not applied yet"]


# ---- reading requests ---------------------------------------------------------------------------


def _query(request: web.Request, *allowed: str) -> dict[str, str]:
    """Each key at most once, and none that we do not know."""
    for key in request.query:
        if key not in allowed:
            raise _Refusal(400, f"the query has no {key}", list(allowed))
        if len(request.query.getall(key)) > 1:
            raise _Refusal(400, f"{key} is given twice", "once")
    return dict(request.query)


def _wait_s(text: str) -> int:
    try:
        return duration_s(text, 0, LONGEST_WAIT_S)
    except ValueError as error:
        raise _Refusal(400, f'wait is "{text}"', "0s to 1h, such as 60s or 5m") from error


async def _reason(request: web.Request, query: dict[str, str]) -> str | None:
    """Of the query or the body; None if neither gives one."""
    allowed = f'{{"reason": a printable text of at most {LONGEST_REASON} characters}}'
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.read()
    except TimeoutError as error:
        raise _Refusal(408, f"the body did not come within {BODY_S:g} s") from error
    try:
        given = msgspec.json.decode(body, type=_Body).reason if body.strip() else None
    except msgspec.MsgspecError as error:
        raise _Refusal(400, f"the body: {error}", allowed) from error
    if given is not None and "reason" in query:
        raise _Refusal(400, "reason is given in the query and in the body", "once")
    reason = query.get("reason", given)
    if reason is not None and not (reason.isprintable() and len(reason) <= LONGEST_REASON):
        raise _Refusal(400, "the reason has control characters or is too long", allowed)
    return reason


# ---- answers ------------------------------------------------------------------------------------


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(content) + b"\n"
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _error(
    status: int, error: str, allowed: object = None, headers: dict[str, str] | None = None
) -> web.Response:
    return _json({"error": error, "allowed": allowed}, status, headers)


def _service(service: ServiceStatus) -> dict[str, object]:
    return {**msgspec.to_builtins(service, enc_hook=str), "vips": [_vip(key) for key in service.vips]}


def _vip(key: VipKey) -> dict[str, object]:
    return {"address": str(key.address), "port": key.port, "proto": key.proto.name.lower()}


@web.middleware
async def _told_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _Refusal as no:
        return _error(no.status, str(no), no.allowed)
    except web.HTTPMethodNotAllowed as no:
        methods = sorted(no.allowed_methods)
        return _error(405, f"{request.method} {request.path}", methods, {"Allow": ", ".join(methods)})
    except web.HTTPNotFound:
        return _error(404, f"nothing is at {request.path}", _paths(request.app))
    except web.HTTPException as no:
        return _error(no.status, no.reason)
    except TimeoutError:
        log.error("request_timed_out", method=request.method, path=request.path)
        return _error(504, "not done in time; see the status for why, and ask again")
    except LbAgentError as error:
        return _error(503, str(error))
    except Exception:
        log.exception("request_failed", method=request.method, path=request.path)
        return _error(500, "an error in the agent; its log tells more")


def _paths(app: web.Application) -> list[str]:
    return sorted({route.resource.canonical for route in app.router.routes() if route.resource is not None})


# ---- listening ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _runner(api: Api, token: bytes | None) -> AsyncIterator[web.AppRunner]:
    """The API, for those who have the token; None: for all who reach it."""
    guards = () if token is None else (_guard(token),)
    app = web.Application(middlewares=(_told_as_json, *guards), client_max_size=BODY_BYTES)
    app.add_routes(api.routes())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_S)
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


def _guard(token: bytes) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given_bytes = given.strip().encode("utf-8", "surrogateescape")
        is_right = hmac.compare_digest(given_bytes, token) and scheme.lower() == "bearer"
        if not is_right and request.path not in OPEN_PATHS:
            allowed = "Authorization: Bearer <token>"
            return _error(401, "the token is missing or wrong", allowed, {"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return guard


def _token(config: Admin) -> bytes:
    path = config.token_file
    if path is None:
        raise ConfigError("admin.token_file is missing: admin.address needs it")
    try:
        token = path.read_bytes().strip()
        is_public = path.stat().st_mode & stat.S_IROTH
    except OSError as error:
        raise ConfigError(f"admin.token_file {path}: {error.strerror}") from error
    if not token:
        raise ConfigError(f"admin.token_file {path}: is empty")
    if is_public:
        log.warning("token_file_is_public", path=str(path), todo="chmod o-r")
    return token
