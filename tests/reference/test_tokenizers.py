"""Tokenizers and chat templates against transformers, on real vocabularies."""

from __future__ import annotations

import json
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gguf_files import parsed_once
from tokenizers import pre_tokenizers

from shoal.core.request import SamplingParams
from shoal.text import ChatTemplate, TextStream, Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 22, 333]}  # done\n\n\n",
    "a  b   c    d" + " " * 17 + "e\t\t\tf\r\n\r\ng",
    "It's we'll I'M they'RE 1234567 3.14159 x²⁵ ½ Ⅷ",
    "汉字与漢字、ひらがなカタカナ、한국어 조선말",
    "naïve Zoë Ünïcödé Ελληνικά русский العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧 🇩🇪 👍🏽 ☃️ \u200b\ufeff\u00a0",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<eos><unused5>",
    "https://example.com/a?b=c&d=%20#frag `code` ~~~ --- === ***",
    "\0\x01\x7f\ud7ff\ue000\uffff",
    "e\u0301 \u1112\u1161\u11ab",
]
MESSAGES = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <b> 'x' é "}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two. "},
        {"role": "user", "content": "Three?\n"},
    ],
]
DATED_TEMPLATE = (
    "{{- bos_token }}{%- set date = strftime_now('%d %b %Y') %}{{ date | length }}\n"
    "{%- for message in messages if message.role != 'system' %}\n"
    "    {{- '[' ~ message['role'] | upper ~ '] ' + message['content'] | trim + eos_token }}\n"
    "    {%- if loop.last and loop.index0 > 5 %}{% break %}{% endif %}\n"
    "{%- endfor %}{{ messages[0] | tojson(indent=2) }}{% generation %}!{% endgeneration %}"
)


def _pair(gguf: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    with parsed_once():
        theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return load_tokenizer(gguf), theirs


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[Tokenizer, Any]:
    ours, theirs = _pair(smollm2_gguf)
    # What the model's own tokenizer.json has; transformers does not know the GGUF name "smollm"
    # and takes GPT-2's rules alone, which differ where a space stands before a digit like ½.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return ours, theirs


@pytest.fixture(scope="module")
def gemma3(gemma3_gguf: Path) -> tuple[Tokenizer, Any]:
    return _pair(gemma3_gguf)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_ids_and_text_are_those_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(model)
    for text in [*TEXTS, *_random_texts(200)]:
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens) == ids, text
            for skip in (True, False):
                decoded = theirs.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
                assert ours.decode(ids, skip) == decoded, text
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    assert ours.vocab_size == len(theirs)


def _random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = "aAbeE  \n\t.,'\"!123é日本語👍🏽ß_-"
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_token_bytes_join_to_the_text(model: str, request: pytest.FixtureRequest) -> None:
    ours, _ = request.getfixturevalue(model)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        joined = b"".join(map(ours.token_bytes, ids)).decode("utf-8", "replace")
        assert joined == ours.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_streamed_text_is_the_decoded_text(model: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(model)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        stream = TextStream(ours, SamplingParams(), [ours.bos_token_id])
        streamed = "".join(stream.push([token_id]).text for token_id in ids)
        assert streamed + stream.finish().text == theirs.decode(ids, skip_special_tokens=True)


def test_gemma_ends_its_turns(gemma3: tuple[Tokenizer, Any]) -> None:
    ours, theirs = gemma3
    assert ours.eos_token_ids == (1, theirs.convert_tokens_to_ids("<end_of_turn>"))


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("template", [None, DATED_TEMPLATE])
def test_chat_templates_render_as_in_transformers(
    smollm2: tuple[Tokenizer, Any], messages: list[dict[str, str]], template: str | None
) -> None:
    ours, theirs = smollm2
    chat = ours.require_chat_template()
    if template is not None:
        chat = ChatTemplate(template, ours.special_tokens)
    drafted = [*messages, {"role": "assistant", "content": "So far "}]
    for settings, conversation in (
        ({"add_generation_prompt": True}, messages),
        ({"add_generation_prompt": False}, messages),
        ({"add_generation_prompt": False, "continue_final_message": True}, drafted),
    ):
        expected = theirs.apply_chat_template(
            conversation, tokenize=False, chat_template=template, **settings
        )
        assert chat.render(conversation, now=datetime.now(), **settings) == expected


def test_a_saved_folder_loads_to_the_same(smollm2: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = smollm2
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == ours.encode(text)
    assert loaded.eos_token_ids == (2, 0)
    assert loaded.special_tokens["eos_token"] == "<|im_end|>"
    assert loaded.require_chat_template().source == ours.require_chat_template().source
