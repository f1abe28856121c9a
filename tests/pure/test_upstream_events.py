"""Events of upstreams, cut and read: whole ones only, and nothing past what may be said."""

from __future__ import annotations

import json
import re

import pytest
from upstream_fakes import event

from shoal.core.errors import ConfigError
from shoal.router.upstream.address import parse_address
from shoal.router.upstream.chunks import BadStreamError
from shoal.router.upstream.event_cutter import EventCutter
from shoal.router.upstream.records import Backlog, Call, stand_in_ids
from shoal.router.upstream.stream_events import Narration, renamed, renamings

DONE = b"data: [DONE]\n\n"


def call(**fields: object) -> Call:
    given = {"path": "/v1/chat/completions", "fields": {}, "model": "theirs", "is_stream": True}
    return Call(**{**given, **fields})  # type: ignore[arg-type]


def narration(of: Call | None = None, model: str = "theirs", **flags: bool) -> Narration:
    return Narration(of or call(), model, **{"tells_ids": False, "goes_on": False, **flags})


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_events_are_whole_however_they_come(line_end: bytes, size: int) -> None:
    wanted = [event("a"), event("Grüße 🙂 \n\n \\"), b"event: x\ndata: 1\n\n", DONE]
    comments = b": ping\n\n"
    sent = b"".join([wanted[0], comments, wanted[1], wanted[2], comments, wanted[3]])
    sent = sent.replace(b"\n", line_end)
    cutter = EventCutter()
    found = [
        each for start in range(0, len(sent), size) for each in cutter.feed(sent[start:][:size])
    ]
    assert found == wanted


def test_an_endless_event_is_given_up() -> None:
    cutter = EventCutter()
    with pytest.raises(BadStreamError, match="longer than"):
        for _ in range(100):
            cutter.feed(b"data: " + b"x" * 20_000)


def test_nothing_is_said_before_an_answer_begins_nor_after_it_ends_until_it_is_whole() -> None:
    told = narration()
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    assert told.take([role]) == (b"", ())
    assert told.take([event("a")]) == (role + event("a"), (0,))
    last, usage = event("", finish="length"), b'data: {"choices":[],"usage":{}}\n\n'
    assert told.take([event("b"), last]) == (event("b"), (0,))
    assert told.take([usage]) == (b"", ())
    assert told.take([DONE]) == (last + usage + DONE, (0, 0))
    assert (told.is_done, told.finish) == (True, "length")
    assert told.take([event("c")]) == (b"", ())
    assert told.failure == "events come after the end"


def test_of_several_choices_one_may_end_while_others_go_on() -> None:
    told = narration(call(num_choices=2))
    told.take([event("a")])
    last = event("", finish="stop")
    assert told.take([last])[0] == last
    assert told.take([event("b")])[0] == event("b")


def test_a_stream_that_ends_without_a_sign_is_whole_only_after_a_reason_to_end() -> None:
    told = narration()
    told.take([event("a")])
    assert (told.end(), told.failure) == ((b"", ()), "it ended early")
    told = narration()
    told.take([event("a"), event("", finish="stop")])
    assert told.end()[0] == event("", finish="stop") + DONE


@pytest.mark.parametrize(
    "bad",
    [
        b'data: {"error":{"message":"out of memory"}}\n\n',
        b'data: {"error": {"message":"out of memory"}}\n\n',
        b"event: error\ndata: out of memory\n\n",
    ],
)
def test_an_error_in_a_stream_is_no_part_of_an_answer(bad: bytes) -> None:
    told = narration()
    assert told.take([event("a"), bad, event("b")]) == (event("a"), (0,))
    assert told.failure is not None
    assert "out of memory" in told.failure


@pytest.mark.parametrize("bad", [b"data: no json\n\n", b"<html>\n\n", b"data: [1]\n\n"])
def test_what_is_no_chunk_is_not_passed_on(bad: bytes) -> None:
    told = narration()
    assert told.take([bad]) == (b"", ())
    assert told.failure is not None


@pytest.mark.parametrize("gap", [b":", b": "])
def test_names_of_models_are_the_clients(gap: bytes) -> None:
    given = event("a").replace(b'"model":', b'"model"' + gap)
    said, _ = narration(call(model="public")).take([given])
    assert json.loads(said[6:])["model"] == "public"
    assert json.loads(said[6:])["choices"] == json.loads(event("a")[6:])["choices"]


def shoal_event(text: str, ids: list[int], *, first: bool, finish: str | None = None) -> bytes:
    role = '"role":"assistant",' if first else ""
    reason = "null" if finish is None else f'"{finish}"'
    return (
        f'data: {{"id":"{{}}","object":"chat.completion.chunk","created":1,"model":"theirs",'
        f'"choices":[{{"index":0,"delta":{{{role}"content":{json.dumps(text)}}},"logprobs":null,'
        f'"finish_reason":{reason},"token_ids":{ids}}}]}}\n\n'
    ).encode()


def test_a_stream_that_another_goes_on_with_reads_as_one() -> None:
    def spelled(id_: bytes, *events: bytes) -> list[bytes]:
        return [each.replace(b'"id":"{}"', b'"id":"%b"' % id_) for each in events]

    texts = ["He said ", '"token_ids":[1]', " and left"]
    events = [
        shoal_event(text, [7, number], first=number == 0) for number, text in enumerate(texts)
    ]
    last = shoal_event("", [9], first=False, finish="stop")
    of = call(may_continue=True)
    one = narration(of, tells_ids=True)
    said, ids = one.take(spelled(b"a", *events[:2]))
    assert ids == (7, 0, 7, 1)
    of.begin("same", one.preamble)
    other = narration(of, tells_ids=True, goes_on=True)
    again = shoal_event(texts[2], [7, 2], first=True)
    more, more_ids = other.take([*spelled(b"b", again, last), DONE])
    assert more_ids == (7, 2, 9)
    undisturbed = narration(call(may_continue=True), tells_ids=True)
    assert said + more == undisturbed.take([*spelled(b"a", *events, last), DONE])[0]
    assert not re.search(rb',"token_ids"', said + more)


def test_reading_is_put_off_while_much_waits() -> None:
    backlog, resumed = Backlog(), []
    backlog.put(300_000)
    assert backlog.is_long
    backlog.when_short(lambda: resumed.append(1))
    backlog.took(100_000)
    assert not resumed
    backlog.took(100_000)
    assert resumed == [1]


def test_prompts_that_begin_alike_have_ids_that_do() -> None:
    one, other = stand_in_ids(b"Hello there, you"), stand_in_ids(b"Hello there, we")
    assert one[:3] == other[:3]
    assert len(one) == 4
    assert stand_in_ids(b"a") == (0,)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://a:8000", "a:8000"),
        ("http://a:8000/v1/", "a:8000"),
        ("https://example.org", "example.org:443"),
        ("http://[::1]:80/models/v1", "[::1]:80/models"),
    ],
)
def test_addresses(url: str, name: str) -> None:
    assert parse_address(url).name == name


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("a:8000", "no address"),
        ("ftp://a", "no address"),
        ("http://a:x", "no URL"),
        ("http://me:secret@a", "remove it"),
        ("http://a/x?y=1", "no address"),
        ("http://a/\r\nX: y", "characters|address"),
    ],
)
def test_what_is_no_address_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as refused:
        parse_address(url)
    assert "secret" not in str(refused.value)


def test_a_key_that_would_split_a_header_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_address("http://a", "sk-1\r\nHost: b")
    assert "sk-1" not in str(refused.value)
    assert "sk-1" not in repr(parse_address("http://a", "sk-1"))


@pytest.mark.parametrize("said", ["theirs", "theirs@main", "theirs-2026-11-22"])
@pytest.mark.parametrize("sign", [":", ": "])
def test_the_model_has_the_name_that_the_client_used_whatever_was_added_to_it(
    said: str, sign: str
) -> None:
    text = f'{{"model"{sign}"{said}","text":"\\"model\\":\\"theirs\\""}}'
    ours = renamed(text.encode(), renamings("theirs", "ours"))
    assert json.loads(ours) == {**json.loads(text), "model": "ours"}
    assert renamed(text.encode(), renamings("other", "ours")) == text.encode()
    assert renamed(text.encode(), renamings("ours", "ours")) == text.encode()
