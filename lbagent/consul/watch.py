"""Asking again and again with the index of the last answer, so that Consul answers when something changed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from lbagent.consul.client import Answer
from lbagent.errors import ConsulError

RETRY_S = (0.25, 15.0)  # first and longest wait after a failure
CONFIRM_S = 0.3  # before a doubtful answer is looked into: leader elections and restarts get some time
QUICK_S = 0.5  # whoever answers without news, or jumps back, within this is soon not asked at once again

log = structlog.get_logger()


@dataclass(slots=True)
class Pace:
    """Time and chance, for tests to replace. retries: how often a failure was waited out."""

    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform
    retries: int = 0

    async def back_off(self, failures: int) -> None:
        self.retries += 1
        longest = min(RETRY_S[0] * 2 ** min(failures - 1, 10), RETRY_S[1])
        await self.sleep(self.uniform(0.5, 1.0) * longest)


async def watch(
    read: Callable[[int], Awaitable[Answer]],
    take: Callable[[Answer], Awaitable[bool]],
    failed: Callable[[str], None],
    pace: Pace,
    what: str,
) -> None:
    """Follow one path until cancelled.

    read: asks with an index, 0: answer at once. take: says whether there was news; raises ConsulError if it
    does not believe the answer. After a failure the first question is a plain one again.
    """
    index, failures, idle = 0, 0, 0
    while True:
        asked = pace.monotonic()
        try:
            answer = await read(index)
            news = await take(answer)
        except ConsulError as error:
            index, failures = 0, failures + 1
            (log.warning if failures == 1 else log.debug)(
                "consul_failed", of=what, why=str(error), in_a_row=failures
            )
            failed(str(error))
            await pace.back_off(failures)
            continue
        if failures:
            log.info("consul_answers_again", of=what, after=failures)
        failures, index = 0, following(index, answer.index)
        waited = pace.monotonic() - asked > QUICK_S
        idle = 0 if waited or (news and index) else idle + 1
        if idle > 1:
            await pace.sleep(min(0.01 * 2 ** min(idle, 10), 1.0))


def following(index: int, answered: int) -> int:
    """The index to ask with next. One that goes backwards, as after a restart, means to start again."""
    return 0 if answered < index else max(answered, 1)
