"""Upstreams that are replaced at their address, one by one: what the router is told of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

from test_upstreams import in_loop
from upstream_fakes import CHAT, FakeUpstream, listening, until

from shoal.core.request import SamplingParams
from shoal.router.driver import Router
from shoal.router.events import AttemptFailed, Event, ReplicaLost, ReplicaReady
from shoal.router.upstream.address import parse_address
from shoal.router.upstream.client import CheckTimes, UpstreamClient
from shoal.router.upstream.door import Door
from shoal.router.upstream.records import Call, ProxiedRequest

QUICK = CheckTimes(every_s=0.02, timeout_s=5.0, first_retry_s=0.02, max_retry_s=0.05)


class Heard:
    """In place of a router."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def of(self, upstream: FakeUpstream) -> list[tuple[str, int, bool]]:
        """What became of it: its incarnation, and whether nobody goes on with its streams."""
        name = upstream.url.removeprefix("http://")
        told = []
        for each in self.events:
            if isinstance(each, ReplicaReady) and each.replica == name:
                told.append(("ready", each.incarnation, each.info.restarts))
            elif isinstance(each, ReplicaLost) and each.replica == name:
                told.append(("lost", each.incarnation, False))
        return told


def shoals(continuation: str, num_seqs: int = 4) -> dict[str, Any]:
    """A server's of shoal."""
    card = {"continuation": continuation, "max_num_seqs": num_seqs, "num_kv_blocks": 100}
    return {"shoal": card}


@contextlib.asynccontextmanager
async def checked(
    *upstreams: FakeUpstream, door: Door | None = None, times: CheckTimes = QUICK
) -> AsyncIterator[tuple[Heard, list[UpstreamClient]]]:
    """Their clients run, and each was ready once, in order."""
    heard, door = Heard(), door or Door()
    async with listening(*upstreams), contextlib.AsyncExitStack() as stack:
        clients = []
        for upstream in upstreams:
            client = UpstreamClient(parse_address(upstream.url), door, None, times)
            running = asyncio.create_task(client.run(cast(Router, heard)))
            stack.push_async_callback(client.close)
            stack.callback(running.cancel)
            clients.append(client)
            await until(lambda upstream=upstream: bool(heard.of(upstream)))  # type: ignore[misc]
        yield heard, clients


@in_loop
async def test_an_upstream_with_other_weights_is_another_replica() -> None:
    upstream = FakeUpstream(card=shoals("old"))
    async with checked(upstream) as (heard, _):
        upstream.card = shoals("new")
        await until(lambda: len(heard.of(upstream)) == 3)
        assert heard.of(upstream) == [
            ("ready", 0, False),
            ("lost", 0, False),
            ("ready", 1, False),  # nobody of the old kind is left
        ]


@in_loop
async def test_a_stranger_in_place_of_a_server_of_shoal_goes_on_with_nothing() -> None:
    upstream = FakeUpstream(card=shoals("old"))
    async with checked(upstream) as (heard, _):
        upstream.card = {}
        await until(lambda: len(heard.of(upstream)) == 3)
        assert heard.of(upstream)[1:] == [("lost", 0, False), ("ready", 1, True)]


@in_loop
async def test_another_name_of_the_model_is_asked_for_at_once() -> None:
    upstream = FakeUpstream(model="old")
    door = Door([("ours", "old"), ("ours", "new")])
    async with checked(upstream, door=door) as (heard, (client,)):
        upstream.model = "new"
        await until(lambda: len(heard.of(upstream)) == 3)
        client.send(request("r", "ours"))
        await until(lambda: bool(upstream.asked))
        assert upstream.asked[0].body["model"] == "new"


@in_loop
async def test_one_that_takes_less_than_before_is_the_same() -> None:
    upstream = FakeUpstream(card=shoals("same", num_seqs=8))
    async with checked(upstream) as (heard, _):
        upstream.card = shoals("same", num_seqs=4)
        await until(lambda: len(heard.events) > 1)
        assert heard.of(upstream) == [("ready", 0, False)] * 2
        infos = [each.info for each in heard.events if isinstance(each, ReplicaReady)]
        assert infos == [infos[0], replace(infos[0], max_num_seqs=4)]
        num_checks = upstream.num_checks
        await until(lambda: upstream.num_checks > num_checks + 2)
        assert len(heard.events) == 2, "it is told once"


@in_loop
async def test_once_all_are_upgraded_their_streams_can_be_gone_on_with_again() -> None:
    one, other = FakeUpstream(card=shoals("old")), FakeUpstream(card=shoals("old"))
    async with checked(one, other) as (heard, _):
        one.card = shoals("new")
        await until(lambda: len(heard.of(one)) == 3)
        assert heard.of(one)[-1] == ("ready", 1, True), "the other one is of the old kind"
        other.card = shoals("new")
        await until(lambda: len(heard.of(other)) == 3)
        assert heard.of(other)[-1] == ("ready", 1, False)
        # It is told at once, and loses nothing.
        assert heard.of(one)[-1] == ("ready", 1, False)


@in_loop
async def test_what_another_model_began_is_not_gone_on_with() -> None:
    upstream = FakeUpstream(card=shoals("new"))
    async with checked(upstream) as (heard, (client,)):
        for name, continuation in (("theirs", "old"), ("ours", "new")):
            client.send(request(name, "theirs", (7, 8), continuation))
        await until(lambda: bool(upstream.asked))
        failed = [each for each in heard.events if isinstance(each, AttemptFailed)]
        assert (failed[0].request_id, failed[0].error.status) == ("theirs", 503)
        (asked,) = upstream.asked
        assert asked.body["output_token_ids"] == [7, 8]
        assert asked.body["continuation"] == "new"


def test_of_several_kinds_one_is_chosen_as_long_as_it_is_there() -> None:
    door, chosen = Door([("m", "m")]), list[str]()
    door.tells(lambda: chosen.append("again"))
    assert not door.can_continue("a")
    door.entered("one", "a")
    door.entered("two", "b")
    door.entered("three", None)
    assert [door.can_continue(each) for each in ("a", "b", None)] == [True, False, False]
    door.left("one")
    assert door.can_continue("a"), "it may be back"
    door.entered("two", "b")
    assert [door.can_continue(each) for each in ("a", "b")] == [False, True]
    door.entered("one", "a")
    assert [door.can_continue(each) for each in ("a", "b")] == [False, True]
    door.left("two")
    door.entered("three", None)
    assert len(chosen) == 2


def request(
    request_id: str, model: str, ids: tuple[int, ...] = (), continuation: str | None = None
) -> ProxiedRequest:
    call = Call(path=CHAT, fields={}, model=model, is_stream=True, may_continue=True)
    call.begin(continuation or "none", None)
    return ProxiedRequest(
        request_id=request_id,
        prompt_ids=(1,),
        sampling=SamplingParams(seed=1),
        output_ids=ids,
        call=call,
    )
