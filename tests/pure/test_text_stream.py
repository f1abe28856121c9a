"""TextStream: whatever the tokens, their grouping and the cut, the text is the batch decode's."""

from __future__ import annotations

import itertools
import os
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.request import SamplingParams
from shoal.text import TextDelta, TextStream, Tokenizer
from shoal.text.gguf_tokenizer import build_gguf_tokenizer
from text_models import byte_level_metadata, sentencepiece_metadata

EOS = 260


@cache
def _tokenizer(build: Any) -> Tokenizer:
    return Tokenizer(
        build_gguf_tokenizer(build()), special_tokens={}, eos_token_ids=(), chat_template=None
    )


def _byte_level() -> Tokenizer:
    return _tokenizer(byte_level_metadata)


def _expected(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, int]:
    """Text and number of tokens by the slow definition: decode every prefix, look for a stop."""
    for end in range(max(1, params.min_tokens), len(ids) + 1):
        done, before = (_settled(tokenizer, ids[:count], params) for count in (end, end - 1))
        if end == len(ids):
            done = tokenizer.decode(ids, params.skip_special_tokens)
        for length in range(len(before) + 1, len(done) + 1):
            stops = [stop for stop in params.stop if done[:length].endswith(stop)]
            if stops:
                longest = max(stops, key=len)
                keep = length if params.include_stop_str_in_output else length - len(longest)
                return done[:keep], end
    return tokenizer.decode(ids, params.skip_special_tokens), len(ids)


def _settled(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> str:
    """Text whose characters are complete: what no later byte changes."""
    endings = ([0x41], [0x80], [0xA0, 0x80], [0x9F, 0x98, 0x80])
    futures = [tokenizer.decode([*ids, *end], params.skip_special_tokens) for end in endings]
    return os.path.commonprefix(futures)  # noqa: RUF071 - of characters, as meant


IDS = st.lists(
    st.sampled_from([*b"abAB<", 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xC3, 0xFF, 256, 257, 258, EOS, 261]),
    max_size=24,
)
STOPS = st.lists(st.text("abABhel€� <", min_size=1, max_size=4), max_size=3).map(tuple)


@given(
    ids=IDS,
    stop=STOPS,
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    skip=st.booleans(),
    data=st.data(),
)
def test_any_grouping_and_any_cut_give_the_batch_text(
    ids: list[int], stop: tuple[str, ...], min_tokens: int, include: bool, skip: bool, data: Any
) -> None:
    tokenizer = _byte_level()
    params = SamplingParams(
        stop=stop,
        min_tokens=min_tokens,
        include_stop_str_in_output=include,
        skip_special_tokens=skip,
    )
    expected, _ = _expected(tokenizer, ids, params)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    bounds = [0, *cuts, len(ids)]
    restart = data.draw(st.integers(0, len(bounds) - 1))
    stream = TextStream(tokenizer, params, (EOS,))
    text = ""
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if index == restart:  # another process takes over
            stream = TextStream(tokenizer, params, (EOS,), ids[:start])
        text += stream.push(ids[start:end]).text
    text += stream.finish().text
    assert text == expected


@given(ids=IDS, stop=STOPS)
def test_offsets_and_counts_agree_with_the_text(ids: list[int], stop: tuple[str, ...]) -> None:
    tokenizer = _byte_level()
    params = SamplingParams(stop=stop, include_stop_str_in_output=True)
    deltas = _stream(tokenizer, params, [[token_id] for token_id in ids])
    text = "".join(delta.text for delta in deltas)
    offsets = [offset for delta in deltas for offset in delta.offsets]
    expected, num_tokens = _expected(tokenizer, ids, params)
    assert text == expected
    assert len(offsets) == sum(delta.num_tokens for delta in deltas) == num_tokens
    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)


def _stream(
    tokenizer: Tokenizer, params: SamplingParams, chunks: list[list[int]], prompt: int = EOS
) -> list[TextDelta]:
    stream = TextStream(tokenizer, params, (prompt,))
    return [*(stream.push(chunk) for chunk in chunks), stream.finish()]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    params = SamplingParams(stop=("abX",))
    deltas = _stream(_byte_level(), params, [[*b"zab"], [*b"ab"], [*b"c"], [*b"a"]])
    assert [delta.text for delta in deltas] == ["z", "ab", "abc", "", "a"]


def test_tokens_behind_the_stop_do_not_count() -> None:
    stream = TextStream(_byte_level(), SamplingParams(stop=("b",)), ())
    delta = stream.push([*b"abcd"])
    assert (delta.text, delta.num_tokens, delta.stop, len(delta.offsets)) == ("a", 2, "b", 2)
    assert stream.push([*b"e"]) == TextDelta("", 0, (), "b")
    assert stream.finish() == TextDelta("", stop="b")


def test_no_stop_string_counts_before_min_tokens() -> None:
    stream = TextStream(_byte_level(), SamplingParams(stop=("b",), min_tokens=3), ())
    assert [stream.push([token_id]).text for token_id in b"bbb"] == ["b", "b", ""]
    assert stream.stop == "b"


def test_a_character_waits_for_its_bytes_and_an_unfinished_one_is_shown_at_the_end() -> None:
    deltas = _stream(_byte_level(), SamplingParams(), [[0xE2], [0x82], [0xAC], [0xF0]])
    assert [delta.text for delta in deltas] == ["", "", "€", "", "�"]
    assert [offset for delta in deltas for offset in delta.offsets] == [0, 0, 0, 1]


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_token_counts_but_shows_only_on_request(include: bool, text: str) -> None:
    params = SamplingParams(include_stop_str_in_output=include)
    delta = TextStream(_byte_level(), params, ()).push([*b"ab"], stop_token=True)
    assert (delta.text, delta.num_tokens) == (text, 2)


def test_sentencepiece_keeps_the_space_that_follows_a_prompt() -> None:
    tokenizer = _tokenizer(sentencepiece_metadata)
    hello = tokenizer.encode("hello", add_special_tokens=False)
    bos_only, prompt = (1,), (1, *hello)
    assert TextStream(tokenizer, SamplingParams(), bos_only).push(hello).text == "hello"
    assert TextStream(tokenizer, SamplingParams(), prompt).push(hello).text == " hello"


@given(text=st.text(max_size=40))
def test_sentencepiece_streams_byte_fallback(text: str) -> None:
    tokenizer = _tokenizer(sentencepiece_metadata)
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = _stream(tokenizer, SamplingParams(), [[token_id] for token_id in ids], prompt=1)
    streamed = "".join(delta.text for delta in deltas)
    assert streamed == text == tokenizer.decode(ids)
