"""A stream that one server of shoal began and another goes on with: the client sees one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from server_fakes import MODEL, FakeRouter, make_app, running
from test_upstreams import in_loop
from upstream_fakes import CHAT, FakeUpstream, Front, chat, events_of, fronting, listening

from shoal.core.request import ErrorInfo, GenerateRequest

SAID = 'Grüße, 漢字 🙂 "quotes" \\ end'
ANSWER = tuple(SAID.encode())
"""A token per byte, so that most cuts are inside a character."""
LOST = ErrorInfo(status=503, code="replica_lost", message="gone")
COMPLETIONS = "/v1/completions"


@contextlib.contextmanager
def shoals(*routers: FakeRouter, continuation: str = "same") -> Iterator[list[str]]:
    """Real servers of shoal, whose replicas play a script."""
    with contextlib.ExitStack() as stack:
        apps = (make_app(each, continuation=continuation) for each in routers)
        yield [stack.enter_context(running(app)) for app in apps]


async def streamed(front: Front, path: str, **fields: Any) -> list[str]:
    body = {"prompt": "a", **fields} if path == COMPLETIONS else chat(**fields)
    answer = await front.http.post(path, json={"stream": True, **body})
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


def of_clients(router: FakeRouter) -> list[GenerateRequest]:
    """Without the checks of whether it generates."""
    return [each for each in router.requests if each.sampling.max_tokens != 1]


def said(events: list[str]) -> str:
    choices = [each for event in events[:-1] for each in json.loads(event).get("choices", ())]
    return "".join(
        each["text"] if "text" in each else each["delta"].get("content", "") for each in choices
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("cut", [1, 3, 8, 9, 14, len(ANSWER) - 1])
@in_loop
async def test_a_cut_stream_reads_as_if_it_were_whole(path: str, cut: int) -> None:
    breaking = FakeRouter(answer=ANSWER, failure=LOST, failure_at=cut)
    good = FakeRouter(answer=ANSWER)
    fields: dict[str, Any] = {
        "max_tokens": 100,
        "stop": ["quotez", " 🙂x"],  # held back, and not found
        "stream_options": {"include_usage": True},
        "temperature": 1.0,
    }
    with shoals(breaking, good) as urls:
        async with fronting(*urls) as front:
            while not of_clients(breaking):
                events = await streamed(front, path, **fields)
        async with fronting(urls[1]) as front:
            undisturbed = await streamed(front, path, **fields)
    assert said(events) == SAID == said(undisturbed)
    ids = {json.loads(each)["id"] for each in events[:-1]}
    assert len(ids) == 1
    whole = json.loads(events[-2])["usage"], json.loads(undisturbed[-2])["usage"]
    assert whole[0] == whole[1]
    assert whole[0]["completion_tokens"] == len(ANSWER) + 1
    first, *rest = (
        (each["delta"] for event in events[:-2] for each in json.loads(event)["choices"])
        if path == CHAT
        else ({"role": "assistant"},)
    )
    assert first["role"] == "assistant"
    assert not any("role" in each for each in rest)
    assert not any("token_ids" in each for each in events)
    (begun,) = of_clients(breaking)
    assert begun.sampling.seed is not None
    (goes_on,) = (each for each in of_clients(good) if each.output_ids)
    assert goes_on.output_ids == ANSWER[:cut]
    assert goes_on.sampling == begun.sampling
    assert goes_on.prompt_ids == begun.prompt_ids


@in_loop
async def test_seeds_go_along_and_are_the_clients_if_it_gave_one() -> None:
    breaking = FakeRouter(answer=ANSWER, failure=LOST, failure_at=4)
    other = FakeRouter(answer=ANSWER, failure=LOST, failure_at=9)
    with shoals(breaking, other) as urls:
        async with fronting(*urls) as front:
            await streamed(front, CHAT, max_tokens=50, seed=7)
            asked = of_clients(breaking) + of_clients(other)
            assert {each.sampling.seed for each in asked} == {7}
            assert len(asked) > 1
            await streamed(front, CHAT, max_tokens=50)
            more = {each.sampling.seed for each in of_clients(breaking) + of_clients(other)}
            assert len(more - {7}) == 1


@in_loop
async def test_who_serves_other_weights_does_not_go_on() -> None:
    breaking = FakeRouter(answer=ANSWER, failure=LOST, failure_at=4)
    good = FakeRouter(answer=ANSWER)
    with shoals(breaking) as urls, shoals(good, continuation="other") as others:
        async with fronting(*urls, *others) as front:
            while not of_clients(breaking):
                events = await streamed(front, CHAT, max_tokens=50)
    assert json.loads(events[-1])["error"]["code"]
    assert not any(each.output_ids for each in good.requests)


@in_loop
async def test_several_choices_and_strangers_end_in_an_error() -> None:
    breaking = FakeRouter(answer=ANSWER, failure=LOST, failure_at=4)
    good, stranger = FakeRouter(answer=ANSWER), FakeUpstream(model=MODEL)
    with shoals(breaking, good) as urls:
        async with listening(stranger), fronting(*urls) as front:
            while not of_clients(breaking):
                events = await streamed(front, CHAT, max_tokens=50, n=2)
            assert "error" in json.loads(events[-1])
            assert not any(each.output_ids for each in good.requests)
        names = ((MODEL, MODEL),)
        async with listening(stranger), fronting(urls[0], stranger.url, names=names) as front:
            num_asked = len(of_clients(breaking))
            while len(of_clients(breaking)) == num_asked:
                events = await streamed(front, CHAT, max_tokens=50)
            assert "error" in json.loads(events[-1])


@in_loop
async def test_ids_are_shown_to_who_asks_for_them() -> None:
    with shoals(FakeRouter(answer=ANSWER)) as urls:
        async with fronting(*urls) as front:
            events = await streamed(front, CHAT, max_tokens=9, return_token_ids=True)
    chunks = [json.loads(each) for each in events[:-1]]
    ids = [id_ for each in chunks for id_ in each["choices"][0]["token_ids"]]
    assert tuple(ids) == ANSWER[:9]
