"""Watches against a Consul that is told what to say, and when to lie: errors and lies take nothing away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from consul import aio as py_consul
from consul.base import Response
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.config import Consul as Settings
from lbagent.config import Secret, Url
from lbagent.consul import NodeWatcher, Watcher
from lbagent.consul.client import Answer, Client, connect
from lbagent.consul.watch import RETRY_S, Pace, following
from lbagent.consul.words import Check, Entry, decode, instance, standing
from lbagent.core.dsr import Registration
from lbagent.core.state import CatalogAnswered, ConsulFailed, ServiceAnswered
from lbagent.core.status import Standing
from lbagent.errors import ConfigError, ConsulError

T = TypeVar("T")
Lie = Callable[[str, Mapping[str, str]], Answer | None]

CATALOG = "/v1/catalog/services"
WEB = "/v1/health/service/web"


def entry(n: int, *statuses: str, tags: tuple[str, ...] = ("lb",), **service: Any) -> dict[str, Any]:
    """As Consul writes it, with things we do not need."""
    return {
        "Node": {"ID": "x", "Node": f"n{n}", "Address": f"10.0.0.{n}", "Meta": None},
        "Service": {
            "ID": f"i{n}",
            "Service": "web",
            "Port": 80,
            "Address": "",
            "Tags": list(tags),
            "Meta": {},
            **service,
        },
        "Checks": [{"CheckID": f"c{k}", "Status": status, "Output": ""} for k, status in enumerate(statuses)],
    }


@dataclass
class Fake:
    """A Consul that blocks until it changes. lie: asked first, for reads that are not consistent."""

    health: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    index: int = 10
    lie: Lie | None = None
    lies_always: bool = False
    asked: list[tuple[str, Mapping[str, str], float]] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def read(self, path: str, params: Mapping[str, str], deadline_s: float) -> Answer:
        self.asked.append((path, params, deadline_s))
        if (
            self.lie
            and ("consistent" not in params or self.lies_always)
            and (found := self.lie(path, params))
        ):
            return found
        async with self.changed:
            await self.changed.wait_for(lambda: self.index > int(params.get("index", "0")))
        return Answer(json.dumps(self.truth(path)), self.index)

    def truth(self, path: str) -> object:
        if path == CATALOG:
            tags = {
                name: sorted({t for e in found for t in e["Service"]["Tags"]})
                for name, found in self.health.items()
            }
            return {"consul": [], **tags}
        if path == "/v1/agent/self":
            return {"Config": {"NodeName": "n1"}, "Stats": {}}
        if path.startswith("/v1/catalog/node/"):
            all_ = [
                e
                for found in self.health.values()
                for e in found
                if e["Node"]["Node"] == path.rpartition("/")[2]
            ]
            return (
                {"Node": all_[0]["Node"], "Services": {e["Service"]["ID"]: e["Service"] for e in all_}}
                if all_
                else None
            )
        return self.health.get(path.removeprefix("/v1/health/service/"), [])

    async def change(self, **health: list[dict[str, Any]]) -> None:
        """An empty list: the service is gone."""
        self.health = {name: found for name, found in {**self.health, **health}.items() if found}
        await self.wake()

    async def wake(self) -> None:
        self.index += 1
        async with self.changed:
            self.changed.notify_all()


@dataclass
class Told:
    """What was emitted. Time stands still but for sleeps, which are over at once."""

    fake: Fake
    events: list[Any] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def emit(self, event: object) -> None:
        self.events.append(event)
        self.news.set()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.news.set()
        await asyncio.sleep(0)

    async def until(self, wanted: Callable[[Any], bool]) -> Any:
        """The next event that is as wanted; those before it are forgotten."""
        async with asyncio.timeout(5):
            while True:
                while self.events:
                    if wanted(event := self.events.pop(0)):
                        return event
                self.news.clear()
                await self.news.wait()

    async def answered(self, *hosts: int) -> None:
        await self.until(
            lambda e: (
                isinstance(e, ServiceAnswered) and [i.node for i in e.instances] == [f"n{n}" for n in hosts]
            )
        )

    async def failed(self, service: str | None, why: str = "") -> None:
        await self.until(lambda e: isinstance(e, ConsulFailed) and e.service == service and why in e.error)

    async def listed(self, *services: str) -> None:
        await self.until(lambda e: isinstance(e, CatalogAnswered) and e.services == set(services))

    async def failed_in_a_row(self, times: int) -> None:
        async with asyncio.timeout(5):
            while RETRY_S[0] * 2 ** (times - 1) not in self.slept:
                self.news.clear()
                await self.news.wait()

    def never_lost(self) -> bool:
        return not any(isinstance(e, ServiceAnswered) and not e.instances for e in self.events)


@contextlib.asynccontextmanager
async def watching(
    fake: Fake,
    node: bool = False,
    access: Settings = Settings(),  # noqa: B008 - it is immutable
) -> AsyncIterator[Told]:
    told = Told(fake)
    pace = Pace(told.sleep, lambda: 1000.0, lambda: 0.0, lambda low, high: high)

    @contextlib.asynccontextmanager
    async def connected(access: object) -> AsyncIterator[Fake]:
        yield fake

    watcher = NodeWatcher(access, None, pace, connected) if node else Watcher(access, pace, connected)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(watcher.run(told.emit))
        yield told
        task.cancel()


# ---- what is told -------------------------------------------------------------------------------


async def test_opted_in_services_are_watched_and_others_are_not() -> None:
    fake = Fake({"web": [entry(1), entry(2, tags=("x",))], "db": [entry(3, tags=("y",))], "?x": [entry(4)]})
    async with watching(fake) as told:
        await told.listed("web")
        await told.answered(1)
        await fake.change(web=[entry(1), entry(2)], db=[entry(3)])
        await told.listed("web", "db")
    assert not [path for path, _, _ in fake.asked if "?x" in path]


async def test_each_change_of_health_is_told() -> None:
    fake = Fake({"web": [entry(1, "passing")]})
    async with watching(fake) as told:
        await told.answered(1)
        await fake.change(web=[entry(1, "passing", "critical")])
        event = await told.until(
            lambda e: isinstance(e, ServiceAnswered) and e.instances[0].standing is Standing.CRITICAL
        )
        assert event.at == 1000.0


async def test_an_answer_without_news_renews_the_time_of_the_last_good_one() -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        await fake.wake()
        await told.answered(1)
    assert not any("passing" in params for _, params, _ in fake.asked)


async def test_a_service_that_is_gone_is_believed_once_all_answers_agree() -> None:
    fake = Fake({"web": [entry(1)], "api": [entry(2)]})
    async with watching(fake) as told:
        await told.listed("api", "web")
        await told.answered(1)
        await fake.change(web=[])
        await told.answered()
        await told.listed("api")
        await fake.change(web=[entry(1)])
        await told.listed("api", "web")
        await told.answered(1)
    assert any("consistent" in params for _, params, _ in fake.asked)


async def test_a_service_that_opts_out_is_left() -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        await fake.change(web=[entry(1, tags=("other",))])
        await told.answered()
        await told.listed()


async def test_a_service_that_shrinks_but_not_to_nothing_is_believed_at_once() -> None:
    fake = Fake({"web": [entry(1), entry(2)]})
    async with watching(fake) as told:
        await told.answered(1, 2)
        await fake.change(web=[entry(2)])
        await told.answered(2)
    assert not any("consistent" in params for _, params, _ in fake.asked)


# ---- lies ---------------------------------------------------------------------------------------


def lying(path: str, content: object, *, filtered: bool = False, index: int = 99) -> Lie:
    answer = Answer(content if isinstance(content, str) else json.dumps(content), index, filtered)
    return lambda asked, params: answer if asked == path else None


@pytest.mark.parametrize("always", [False, True])
async def test_empty_health_of_a_service_that_is_listed_is_a_lie(always: bool) -> None:
    fake = Fake({"web": [entry(1)]}, lies_always=always)
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lying(WEB, [])
        await fake.wake()
        await told.failed("web", "no instances: web")
        await told.failed("web")
        assert told.never_lost()
        fake.lie = None
        await told.answered(1)


async def test_an_empty_list_of_services_is_a_lie() -> None:
    fake = Fake({"web": [entry(1)]}, lies_always=True)
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lying(CATALOG, {})
        await fake.wake()
        await told.failed(None, "the list of services is empty")
        await told.failed(None)
        assert told.never_lost()


async def test_an_empty_list_at_the_start_is_no_answer() -> None:
    async with watching(Fake(lie=lying(CATALOG, {}))) as told:
        await told.failed(None, "may the token read")
        assert not any(isinstance(e, CatalogAnswered) for e in told.events)


async def test_a_list_that_lacks_a_service_whose_health_has_instances_is_doubted_for_it_alone() -> None:
    fake = Fake({"web": [entry(1)], "api": [entry(2)]}, lies_always=True)
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lying(CATALOG, {"consul": [], "api": ["lb"], "dns": ["lb"]})
        await fake.change(dns=[entry(3)])
        await told.listed("api", "dns", "web")
        await told.failed(None, "web has instances in another answer")
        await fake.change(web=[entry(1), entry(4)])
        await told.answered(1, 4)
        assert told.never_lost()


async def test_a_service_that_one_answer_has_and_another_has_not_is_doubted() -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie, fake.lies_always = lying(CATALOG, {"consul": [], "web": []}), True
        fake.health = {}
        await fake.wake()
        await told.failed(None, "is there by one answer and not by another")
        assert told.never_lost()


async def test_what_cannot_be_confirmed_is_doubted() -> None:
    fake = Fake({"web": [entry(1)]}, lies_always=True)
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lambda path, params: (
            Answer("[" if "consistent" in params else "[]", 99) if path == WEB else None
        )
        await fake.wake()
        await told.failed("web", "cannot be confirmed: nonsense")


async def test_a_shrink_that_acls_may_have_made_is_not_believed() -> None:
    fake = Fake({"web": [entry(1), entry(2)], "api": [entry(3)]})
    async with watching(fake) as told:
        await told.answered(1, 2)
        fake.lie = lying(WEB, [entry(1)], filtered=True)
        await fake.wake()
        await told.failed("web", "filtered by ACLs")
        fake.lie = lying(CATALOG, {"consul": [], "api": ["lb"]}, filtered=True)
        await fake.wake()
        await told.failed(None, "filtered by ACLs")
        assert told.never_lost()


async def test_that_nothing_is_left_is_not_believed_of_a_filtered_answer() -> None:
    fake = Fake({"web": [entry(1)]}, lies_always=True)
    async with watching(fake) as told:
        await told.answered(1)

        def lie(path: str, params: Mapping[str, str]) -> Answer | None:
            if path == WEB:
                return Answer("[]", 99, filtered="consistent" in params)
            return Answer('{"consul": []}', 99)

        fake.lie = lie
        await fake.wake()
        await told.failed("web", "ACLs filter away")
        assert told.never_lost()


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "[",
        "null",
        "{}",
        "[{}]",
        '"x"',
        json.dumps([entry(1, "unheard-of")]),
        json.dumps([entry(1, Port="80")]),
        json.dumps([entry(1, Weights={"Passing": -1})]),
        json.dumps([entry(1, Meta={"a": 1})]),
    ],
)
async def test_nonsense_changes_nothing(nonsense: str) -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lying(WEB, nonsense)
        await fake.wake()
        await told.failed("web", "nonsense")
        assert told.never_lost()
        fake.lie = None
        await told.answered(1)


# ---- asking -------------------------------------------------------------------------------------


async def test_blocking_questions_carry_the_index_and_outlast_the_servers_wait() -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        await fake.wake()
        await told.answered(1)
    questions = [(params, deadline) for path, params, deadline in fake.asked if path == WEB]
    assert questions[0][0] == {}
    assert questions[1][0] == {"index": "10", "wait": "300s"}
    assert questions[1][1] > 300 * 17 / 16


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_the_next_index_is_the_answers_or_a_new_start(index: int, answered: int) -> None:
    assert following(index, answered) == (0 if answered < index else max(1, answered))


async def test_an_index_that_goes_backwards_means_to_start_again() -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lying(WEB, [entry(1)], index=3)
        await fake.wake()
        await told.answered(1)
        await told.answered(1)
    questions = [params.get("index") for path, params, _ in fake.asked if path == WEB]
    assert questions[:4] == [None, "10", "11", None]


async def test_failures_back_off_to_a_limit_and_start_with_a_plain_question() -> None:
    def fail(path: str, params: Mapping[str, str]) -> Answer:
        raise ConsulError("HTTP 500: rpc error")

    fake = Fake(lie=fail)
    async with watching(fake) as told:
        for _ in range(9):
            await told.failed(None, "HTTP 500")
    assert told.slept[:8] == [0.25, 0.5, 1, 2, 4, 8, RETRY_S[1], RETRY_S[1]]
    assert all(params == {} for _, params, _ in fake.asked)


async def test_who_answers_at_once_without_news_is_asked_ever_slower() -> None:
    fake = Fake({"web": [entry(1)]})
    async with watching(fake) as told:
        await told.answered(1)
        fake.lie = lying(WEB, [entry(1)])
        await fake.wake()
        for _ in range(12):
            await told.answered(1)
    assert told.slept[0] < 0.1
    assert told.slept[-1] == 1.0


async def test_watches_that_outnumber_the_connections_take_short_turns() -> None:
    access = Settings(connections=10)
    for services, wait in ((3, "300s"), (7, "30s"), (8, "2s")):
        fake = Fake({f"s{n}": [entry(n)] for n in range(services)})
        async with watching(fake, access=access) as told:
            await told.until(lambda e: isinstance(e, ServiceAnswered))
            await fake.wake()
            await told.until(lambda e: isinstance(e, ServiceAnswered))
        assert {params["wait"] for _, params, _ in fake.asked if "wait" in params} == {wait}


async def test_no_more_questions_are_under_way_than_there_are_connections() -> None:
    http = Http(None)
    consul = Client(Settings(connections=10), cast("py_consul.Consul", http))
    async with asyncio.TaskGroup() as tasks:
        for params in ({}, {"index": "7"}):
            asked = [tasks.create_task(consul.read("/v1/x", params, 60.0)) for _ in range(20)]
            for _ in range(3):
                await asyncio.sleep(0)
            assert http.under_way == (8 if params else 2)
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)


# ---- words --------------------------------------------------------------------------------------


def decoded(raw: dict[str, Any]) -> Entry:
    return decode(Answer(json.dumps(raw)), Entry)


def test_an_instance_has_its_nodes_address_when_it_has_none() -> None:
    assert instance(decoded(entry(1))).address == "10.0.0.1"
    assert instance(decoded(entry(1, Address="10.9.9.9"))).address == "10.9.9.9"


def test_an_instance_is_reduced_to_what_concerns_us() -> None:
    raw = entry(
        1,
        tags=("x", "lb", "lb.vip=203.0.113.1"),
        Meta={"lb-proto": "udp", "v": "1"},
        Weights={"Passing": 7, "Warning": 0},
    )
    found = instance(decoded(raw))
    assert (found.node, found.id, found.tags, found.meta) == (
        "n1",
        "i1",
        ("lb.vip=203.0.113.1",),
        {"lb-proto": "udp"},
    )
    assert (found.weight_passing, found.weight_warning) == (7, 0)
    bare = instance(decoded(entry(1, Tags=None, Meta=None, Weights=None)))
    assert (bare.tags, bare.meta, bare.weight_passing, bare.weight_warning) == ((), {}, 1, 1)


@pytest.mark.parametrize(
    ("checks", "found"),
    [
        ({}, Standing.PASSING),
        ({"a": "passing"}, Standing.PASSING),
        ({"a": "warning", "b": "passing"}, Standing.WARNING),
        ({"a": "warning", "serfHealth": "critical", "b": "warning"}, Standing.CRITICAL),
        ({"a": "critical", "_node_maintenance": "critical"}, Standing.MAINTENANCE),
        ({"_service_maintenance:i1": "critical", "a": "critical"}, Standing.MAINTENANCE),
        ({"_service_maintenance:other": "critical"}, Standing.CRITICAL),
        ({"_node_maintenance": "passing"}, Standing.PASSING),
    ],
)
def test_all_checks_together_decide(checks: dict[str, Any], found: Standing) -> None:
    assert standing("i1", [Check(name, status) for name, status in checks.items()]) is found


# ---- one node -----------------------------------------------------------------------------------


async def test_a_node_watcher_tells_the_opted_in_instances_of_its_node() -> None:
    fake = Fake(
        {"web": [entry(1, Meta={"lb-vip": "203.0.113.1"}), entry(2)], "db": [entry(1, tags=("x",), ID="db")]}
    )
    one = Registration("web", "i1", 80, (), {"lb-vip": "203.0.113.1"})
    async with watching(fake, node=True) as told:
        assert await told.until(bool) == (one,)
        await fake.change(web=[entry(1, ID="i0"), entry(1, Meta={"lb-vip": "203.0.113.1"})])
        assert await told.until(bool) == (one._replace(id="i0", meta={}), one)
        await fake.change(web=[])
        assert await told.until(lambda e: e == ()) == ()


@pytest.mark.parametrize(
    ("lie", "always"),
    [
        (Answer("null", 99), False),
        (Answer("null", 99), True),
        (Answer('{"Services": {}}', 99), False),
        (Answer('{"Services": {}}', 99, filtered=True), True),
        (Answer('{"Services": 1}', 99), True),
    ],
)
async def test_a_node_watcher_believes_no_lie(lie: Answer, always: bool) -> None:
    fake = Fake({"web": [entry(1)]}, lies_always=always)
    async with watching(fake, node=True) as told:
        await told.until(bool)
        fake.lie = lambda path, params: lie
        await fake.wake()
        await told.failed_in_a_row(2)
        assert told.events == []
        fake.lie = None
        await fake.change(web=[entry(1, ID="i0")])
        assert (await told.until(bool))[0].id == "i0"


# ---- one request --------------------------------------------------------------------------------


@dataclass
class Http:
    """Stands for py-consul: notes the request, gives the response or raises it."""

    response: Response | Exception | None
    headers: dict[str, str] = field(default_factory=dict)
    params: list[tuple[str, str]] = field(default_factory=list)
    under_way: int = 0

    @property
    def http(self) -> Http:
        return self

    async def get(
        self,
        callback: Callable[[Response], T],
        path: str,
        params: Any,
        headers: Any,
        **kwargs: object,
    ) -> T:
        self.headers, self.params = headers, params
        match self.response:
            case None:
                self.under_way += 1
                try:
                    await asyncio.Event().wait()
                finally:
                    self.under_way -= 1
                raise AssertionError
            case Exception() as error:
                raise error
            case response:
                return callback(response)


def ask(http: Http, access: Settings | None = None, deadline_s: float = 5.0) -> Awaitable[Answer]:
    return Client(access or Settings(), cast("py_consul.Consul", http)).read(
        "/v1/x", {"index": "7"}, deadline_s
    )


def ok(body: str = "[]", code: int = 200, **headers: str) -> Response:
    return Response(code, {f"X-Consul-{k.replace('_', '-')}": v for k, v in headers.items()}, body)


async def test_an_answer_carries_index_and_filter() -> None:
    assert await ask(Http(ok(Index="12", KnownLeader="true"))) == Answer("[]", 12, False)
    assert (await ask(Http(ok(Results_Filtered_By_ACLs="true")))).filtered


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (ok("rpc error", 500), "HTTP 500: rpc error"),
        (ok("slow down", 429), "HTTP 429"),
        (ok("", 404), "HTTP 404"),
        (ok(KnownLeader="false"), "no leader"),
        (ok(Index="-1"), "X-Consul-Index"),
        (OSError(111, "refused"), "refused"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError"),
    ],
)
async def test_what_is_no_answer_is_an_error_that_says_why(response: Any, why: str) -> None:
    with pytest.raises(ConsulError, match=why):
        await ask(Http(response))


async def test_an_answer_that_does_not_come_is_given_up() -> None:
    with pytest.raises(ConsulError, match="no answer within"):
        await ask(Http(None), deadline_s=0.01)


async def test_the_token_is_ours_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "theirs")
    token_file = tmp_path / "token"
    token_file.write_text("first\n")
    http, access = (
        Http(ok()),
        Settings(token_file=token_file, token=Secret("unused"), auth=Secret("me:pw"), datacenter="dc2"),
    )
    await ask(http, access)
    assert http.headers == {"X-Consul-Token": "first", "Authorization": "Basic bWU6cHc="}
    assert http.params == [("index", "7"), ("dc", "dc2")]
    token_file.write_text("second")
    await ask(http, access)
    assert http.headers["X-Consul-Token"] == "second"
    await ask(http, Settings(token=Secret("given")))
    assert http.headers == {"X-Consul-Token": "given"}
    with pytest.raises(ConsulError, match="token file"):
        await ask(http, Settings(token_file=tmp_path / "none"))


async def test_certificates_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="certificates"):
        async with connect(Settings(address=Url("https://[::1]:8501"), ca_file=tmp_path / "none")):
            pass
