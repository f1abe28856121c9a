"""Upstreams that fall silent, or are long at work, while clients wait for whole answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
from test_upstreams import in_loop
from upstream_fakes import (
    CHAT,
    Asked,
    FakeUpstream,
    Front,
    Script,
    chat,
    fronting,
    listening,
    until,
    whole,
)

from shoal.router.upstream.client import CheckTimes

QUICK = CheckTimes(every_s=0.5, silence_s=0.1, timeout_s=0.2, first_retry_s=0.05, max_retry_s=0.1)


def _answering(text: str, after: asyncio.Event | None = None) -> Script:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if after is not None:
            await after.wait()
        writer.write(whole(200, {"model": "theirs", "choices": [], "id": text}))

    return answer


async def _ask_both(front: Front) -> list[asyncio.Task[httpx.Response]]:
    return [asyncio.create_task(front.http.post(CHAT, json=chat())) for _ in range(2)]


@in_loop
async def test_whole_answers_of_one_that_stopped_come_from_another() -> None:
    """Which says nothing at all any more, as a process that was stopped."""
    never = asyncio.Event()
    stopped, other = FakeUpstream(script=_answering("stopped", never)), FakeUpstream()
    other.script = _answering("other")
    async with (
        listening(stopped, other),
        fronting(
            stopped.url, other.url, times=replace(QUICK, timeout_s=2.0), hedging=True
        ) as front,
    ):
        name = stopped.url.removeprefix("http://")
        asked = await _ask_both(front)
        await until(lambda: len(stopped.asked) > 0)
        stopped.listens.clear()
        stopped.generates.clear()
        answers = await asyncio.gather(*asked)
        assert [each.json()["id"] for each in answers] == ["other", "other"]
        assert front.router.replicas()[name].is_alive, "nobody waits until it is given up"
        await until(lambda: not front.router.replicas()[name].is_alive)
        stopped.listens.set()
        stopped.generates.set()
        await until(lambda: front.router.replicas()[name].is_alive)


@in_loop
async def test_one_that_works_on_a_whole_answer_for_long_may_finish_it() -> None:
    """Though it generates nothing for others meanwhile, and is asked that again and again."""
    done = asyncio.Event()
    busy, other = FakeUpstream(script=_answering("busy", done)), FakeUpstream()
    other.script = _answering("other", asyncio.Event())
    async with (
        listening(busy, other),
        fronting(busy.url, other.url, times=QUICK, hedging=True) as front,
    ):
        name = busy.url.removeprefix("http://")
        asked = await _ask_both(front)
        await until(lambda: len(busy.asked) > 0)
        busy.generates.clear()
        num_checks = busy.num_checks
        await until(lambda: busy.num_checks >= num_checks + 4)
        assert front.router.replicas()[name].is_alive
        assert len(busy.asked) == 1, "what it cannot begin goes elsewhere"
        done.set()
        first, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert [each.result().json()["id"] for each in first] == ["busy"]
        for each in asked:
            each.cancel()
