"""Streams as servers of other engines spell them: what they say gets through, as it is said.

Each was written after what the engine named sends, or a person's recording of it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.router.upstream.chunks import BadStreamError, check, finishes_of, tells
from shoal.router.upstream.event_cutter import EventCutter
from shoal.router.upstream.records import Call
from shoal.router.upstream.stream_events import Narration

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DONE = b"data: [DONE]\n\n"


def _event(choice: dict[str, Any] | None, begin: bytes = b"data: ", **more: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, **choice}]
    chunk = {"id": "c-1", "created": 1, "model": "m", "choices": choices, **more}
    return begin + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _vllm(text: str, **more: Any) -> bytes:
    rest = {"logprobs": None, "finish_reason": None, "token_ids": None}
    return _event({"delta": {"content": text}, **rest, **more})


def _sglang(role: str | None, text: str | None, finish: str | None = None) -> bytes:
    delta = {"role": role, "content": text, "reasoning_content": None, "tool_calls": None}
    ends = {"logprobs": None, "finish_reason": finish, "matched_stop": None}
    return _event({"delta": delta, **ends}, usage=None)


def _ollama(text: str, finish: str | None = None) -> bytes:
    delta = {"role": "assistant", "content": text}
    return _event({"delta": delta, "finish_reason": finish}, system_fingerprint="fp_ollama")


def _completion(text: str, **more: Any) -> bytes:
    return _event({"text": text, "logprobs": None, "finish_reason": None, **more})


def _tgi(text: str, finish: str | None = None) -> bytes:
    delta = {"role": "assistant", "content": text}
    choice = {"delta": delta, "logprobs": None, "finish_reason": finish}
    return _event(choice, b"data:", usage=None)


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ROLE = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
STREAMS: dict[str, tuple[str, list[bytes]]] = {
    "vLLM": (
        CHAT,
        [
            *(_event(ROLE), _vllm("a"), _vllm("b")),
            _vllm("", finish_reason="stop", stop_reason=None),
            _event(None, usage=USAGE),
            DONE,
        ],
    ),
    "vLLM, completions": (
        COMPLETIONS,
        [
            _completion("a", stop_reason=None, prompt_token_ids=None, token_ids=None),
            _completion("b", stop_reason=None, prompt_token_ids=None, token_ids=None),
            _completion("", finish_reason="length", stop_reason=None, token_ids=None),
            DONE,
        ],
    ),
    "SGLang": (
        CHAT,
        [
            *(_sglang("assistant", ""), _sglang(None, "a"), _sglang(None, "b")),
            _sglang(None, None, "stop"),
            DONE,
        ],
    ),
    "llama.cpp": (
        CHAT,
        [
            _event({"finish_reason": None, "delta": {"role": "assistant", "content": None}}),
            b": ping\n\n",
            _event({"finish_reason": None, "delta": {"content": "a"}}),
            b"data:\n\n",
            _event({"finish_reason": None, "delta": {"content": "b"}}),
            _event({"finish_reason": "stop", "delta": {}}, timings={"predicted_n": 2}),
            DONE,
        ],
    ),
    "llama-cpp-python": (
        CHAT,
        [
            each.replace(b"\n", b"\r\n")
            for each in (
                _event({"delta": {"role": "assistant"}, "logprobs": None, "finish_reason": None}),
                b": ping - 2026-11-22 11:00:00.000000+00:00\n\n",
                _event({"delta": {"content": "a"}, "logprobs": None, "finish_reason": None}),
                _event({"delta": {"content": "b"}, "logprobs": None, "finish_reason": None}),
                _event({"delta": {}, "logprobs": None, "finish_reason": "length"}),
                DONE,
            )
        ],
    ),
    "Ollama": (CHAT, [_ollama("a"), _ollama("b"), _ollama("", "stop"), DONE]),
    "Text Generation Inference": (
        CHAT,
        [_tgi("a"), b":\n\n", _tgi("b"), _tgi("", "eos_token"), b"data: [DONE]\n\n"],
    ),
    "LM Studio": (
        CHAT,
        [
            _event(ROLE, b"event: chat.completion.chunk\ndata: "),
            _event({"delta": {"content": "a"}, "logprobs": None, "finish_reason": None}),
            _event({"delta": {"content": "b"}, "logprobs": None, "finish_reason": None}),
            _event({"delta": {}, "logprobs": None, "finish_reason": "stop"}),
            DONE,
        ],
    ),
    "TensorRT-LLM": (
        CHAT,
        [
            each.replace(b"\n\n", b" \n\n")
            for each in (
                _event({"delta": {"role": "assistant"}}),
                _event({"delta": {"content": "a", "reasoning_content": ""}}),
                _event({"delta": {"content": "b", "reasoning_content": ""}}),
                _event({"delta": {"content": ""}, "finish_reason": "stop", "stop_reason": None}),
                DONE,
            )
        ],
    ),
    "transformers serve": (
        CHAT,
        [
            _event({"delta": {"role": "assistant"}}, system_fingerprint=""),
            _event({"delta": {"content": "a"}}, system_fingerprint=""),
            _event({"delta": {"content": "b"}}, system_fingerprint=""),
            _event({"delta": {}, "finish_reason": "length"}, usage=USAGE),
        ],
    ),
    "an empty reason in every chunk": (
        CHAT,
        [
            _event({"delta": {"reasoning": "a"}, "finish_reason": ""}),
            _event({"delta": {"content": "b"}, "finish_reason": ""}),
            _event({"delta": {}, "finish_reason": "stop"}),
            DONE,
        ],
    ),
    "messages in place of deltas": (
        CHAT,
        [
            _event({"message": {"role": "assistant", "content": "a"}, "finish_reason": ""}),
            _event({"message": {"role": "assistant", "content": "b"}, "finish_reason": ""}),
            _event({"delta": None, "message": None, "finish_reason": "stop"}, usage=None),
            DONE,
        ],
    ),
    "ids, pauses and a mark": (
        CHAT,
        [
            b"\xef\xbb\xbfretry: 1000\n\n",
            b"id: 1\n" + _event({"delta": {"content": "a"}, "finish_reason": None}),
            b"event: message\nid: 2\n" + _event({"delta": {"content": "b"}, "finish_reason": None}),
            b"event: ping\n\n",
            _event(None, prompt_filter_results=[]),
            _event({"delta": {}, "finish_reason": "stop"}),
            b"event: done\ndata: [DONE]",
        ],
    ),
}


def _said(events: bytes) -> str:
    """All texts, in whatever field."""
    said = ""
    for line in events.split(b"\n"):
        if line.startswith(b"data:") and not line.endswith(b"[DONE]"):
            for choice in json.loads(line[5:])["choices"]:
                fields = {**choice, **(choice.get("delta") or choice.get("message") or {})}
                names = ("text", "content", "reasoning")
                said += "".join(fields.get(name) or "" for name in names)
    return said


def _call(path: str, **fields: Any) -> Call:
    return Call(path=path, fields={}, model="m", is_stream=True, **fields)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_each_piece_of_a_text_is_passed_on_when_it_comes(name: str, size: int) -> None:
    path, sent = STREAMS[name]
    call = _call(path)
    narration, cutter = Narration(call, "m", tells_ids=False, goes_on=False), EventCutter()
    passed, num_tokens, heard = b"", 0, []
    for event in sent:
        for start in range(0, len(event), size):
            data, ids = narration.take(cutter.feed(event[start:][:size]))
            passed, num_tokens = passed + data, num_tokens + len(ids)
        assert narration.failure is None
        heard.append(_said(passed))
    for data, ids in (narration.take(cutter.end()), narration.end()):
        passed, num_tokens = passed + data, num_tokens + len(ids)
    assert (narration.failure, narration.is_done) == (None, True)
    assert _said(passed) == "ab"
    assert passed.endswith(DONE.rstrip() + b"\n\n")
    assert num_tokens >= 2
    # An event may be whole only once the next byte has come.
    assert heard.index("a") < heard.index("ab") <= len(sent) - 2


ERRORS: dict[str, bytes] = {
    "vLLM": b'data: {"error": {"message": "CUDA", "type": "X", "param": null, "code": 500}}\n\n',
    "SGLang": b'data: {"error": {"object": "error", "message": "CUDA", "code": 503}}\n\n',
    "transformers": b'data: {"error": "CUDA"}\n\n',
    "Text Generation Inference": b'data:{"error":"CUDA","error_type":"generation"}\n\n',
    "LM Studio": b'event: error\ndata: {"error":{"message":"CUDA"},"message":"CUDA"}\n\n',
    "llama.cpp in 2025": b'error: {"code":500,"message":"CUDA","type":"server_error"}\n\n',
    "among other fields": _event(
        {"delta": {"content": ""}, "finish_reason": "error"}, error={"code": "500", "message": "C"}
    ),
    "as an object": b'data: {"object":"error","message":"CUDA","code":50001}\n\n',
    "as a reason": _event({"delta": {"content": ""}, "finish_reason": "abort"}),
    "about a key": b'data: {"error":{"message":"CUDA","code":401}}\n\n',
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("has_begun", [False, True])
def test_what_went_wrong_is_no_part_of_an_answer(error: bytes, has_begun: bool) -> None:
    narration = Narration(_call(CHAT), "m", tells_ids=False, goes_on=False)
    if has_begun:
        narration.take([_vllm("a")])
    cutter = EventCutter()
    assert narration.take(cutter.feed(error + DONE)) == (b"", ())
    assert narration.failure is not None
    assert narration.refusal is None
    assert not narration.is_done


@pytest.mark.parametrize("code", ["400", '"400"'])
@pytest.mark.parametrize("form", ['data: {"error":{"code":%s,"message":"long"}}', "error: {...}"])
def test_a_request_that_is_wrong_is_the_clients_as_long_as_nothing_was_said(
    code: str, form: str
) -> None:
    form = form.replace("{...}", '{"code":%s,"message":"long"}')
    events = EventCutter().feed((form % code).encode() + b"\n\n" + DONE)
    narration = Narration(_call(CHAT), "m", tells_ids=False, goes_on=False)
    assert narration.take(events) == (b"", ())
    assert narration.refusal is not None
    assert narration.refusal.status == 400
    assert json.loads(narration.refusal.body)["error"]["message"] == "long"
    narration = Narration(_call(CHAT), "m", tells_ids=False, goes_on=False)
    narration.take([_vllm("a")])
    narration.take(events)
    assert narration.failure is not None
    assert narration.refusal is None


@pytest.mark.parametrize("nothing", [None, {}, "", False, []])
def test_no_error_is_none(nothing: Any) -> None:
    check(_event({"delta": {"content": '"error":"x"'}}, error=nothing))
    check(_event({"delta": {"content": "error"}}))


@pytest.mark.parametrize("said", ["", None, 0, [], {}])
def test_what_is_empty_in_any_way_tells_nothing(said: Any) -> None:
    for choice in ({"text": said}, {"delta": {"role": "assistant", "content": said}}):
        assert not tells(_event(choice))
    assert not tells(_event({"delta": said, "text": None, "token_ids": None, "logprobs": None}))
    assert not tells(b'data: {"choices":null,"usage":null}\n\n')
    assert not tells(b'data: {"choices":[null, 1]}\n\n')


@pytest.mark.parametrize(
    ("spelled", "reasons"),
    [
        (b'"finish_reason":null', []),
        (b'"finish_reason":""', []),
        (b'"finish_reason" : "stop"', [b"stop"]),
        (b'"content":"\\"finish_reason\\":\\"stop\\""', []),
        (b'"finish_reason":"length"},{"finish_reason":"stop"', [b"length", b"stop"]),
        (b'"finish_reason":"stop","usage":null', [b"stop"]),
    ],
)
def test_a_reason_to_end_is_one_that_is_given(spelled: bytes, reasons: list[bytes]) -> None:
    assert finishes_of(b'data: {"choices":[{%b}]}\n\n' % spelled, len(reasons)) == reasons


def test_of_several_choices_the_last_to_end_is_held() -> None:
    narration = Narration(_call(CHAT, num_choices=2), "m", tells_ids=False, goes_on=False)
    last = _vllm("", finish_reason="stop")
    assert narration.take([_vllm("a"), last])[0] == _vllm("a") + last
    assert narration.take([_vllm("b"), last])[0] == _vllm("b")
    assert narration.end()[0] == last + DONE


def test_what_says_that_it_ends_and_goes_on_is_not_held_to_its_end() -> None:
    narration = Narration(_call(CHAT), "m", tells_ids=False, goes_on=False)
    events = [_vllm(text, finish_reason="normal") for text in "abc"]
    assert narration.take([events[0]])[0] == b""
    assert narration.take([events[1]])[0] == events[0]
    assert narration.take([events[2]])[0] == events[1]
    assert narration.end()[0] == events[2] + DONE


def test_an_end_of_nothing_is_none() -> None:
    narration = Narration(_call(CHAT), "m", tells_ids=False, goes_on=False)
    assert narration.take([_event(ROLE), DONE]) == (b"", ())
    assert narration.failure == "it ended before it began"


def test_a_last_event_that_is_cut_in_two_is_not_passed_on() -> None:
    cutter = EventCutter()
    assert cutter.feed(_vllm("a")[:-9]) == []
    assert cutter.end() == []
    with pytest.raises(BadStreamError):
        tells(b"data: {\n\n")
