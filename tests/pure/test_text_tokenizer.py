"""Tokenizers from GGUF metadata and from folders: ids, text, bytes, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.core.errors import InvalidRequestError, ModelError, UnsupportedModelError
from shoal.text import Tokenizer, load_tokenizer
from shoal.text.gguf_tokenizer import build_gguf_tokenizer
from text_models import SMALL_TEMPLATE, byte_level_metadata, gguf_bytes, sentencepiece_metadata

TEXTS = [
    "",
    "hello hell he",
    "  two  spaces\n\n\ttabs",
    "naïve 日本語 👩‍👩‍👧",
    "a</s>b<think>c",
    "\0\x01",
]


def _load(tmp_path: Path, metadata: dict[str, Any]) -> Tokenizer:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata))
    return load_tokenizer(path)


@pytest.mark.parametrize("build", [byte_level_metadata, sentencepiece_metadata])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tmp_path: Path, build: Any, text: str) -> None:
    tokenizer = _load(tmp_path, build(add_bos_token=False, add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_byte_level_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, byte_level_metadata())
    assert tokenizer.encode("hel he</s><think>") == [257, 258, 260, 261]
    assert tokenizer.decode([257, 258, 260, 261]) == "hel he<think>"
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (
        262,
        259,
        (260,),
    )


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, sentencepiece_metadata())
    hello = 3 + 256 + 4
    assert tokenizer.encode("hello") == [1, hello]
    assert tokenizer.encode("é", add_special_tokens=False)[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([1, hello, hello]) == "hello hello"


def test_space_prefix_and_bos_eos_flags(tmp_path: Path) -> None:
    flags = {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    tokenizer = _load(tmp_path, sentencepiece_metadata(**flags))
    he = 3 + 256
    assert tokenizer.encode("he") == [he, 2]
    assert tokenizer.encode("he", add_special_tokens=False) == [he]


def test_runs_of_spaces_keep_their_ids(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(add_space_prefix=False, add_bos_token=False)
    metadata["tokenizer.ggml.tokens"].append("  ")
    metadata["tokenizer.ggml.token_type"].append(4)
    metadata["tokenizer.ggml.scores"].append(-1000.0)
    tokenizer = _load(tmp_path, metadata)
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    ids = tokenizer.encode("  he")
    assert ids[0] == tokenizer.vocab_size - 1
    assert tokenizer.decode(ids) == "  he"


def test_tokens_have_bytes_and_text_of_their_own(tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, byte_level_metadata())
    assert (tokenizer.token_bytes(258), tokenizer.token_text(258)) == (b" he", " he")
    assert (tokenizer.token_bytes(0xE2), tokenizer.token_text(0xE2)) == (b"\xe2", "bytes:\\xe2")
    assert tokenizer.token_bytes(10_000) == b""
    assert tokenizer.decode([0xE2, 0x41, 10_000]) == "�A"


@pytest.mark.parametrize(
    ("overrides", "error", "names"),
    [
        ({"pre": "from-the-future"}, UnsupportedModelError, "from-the-future"),
        ({"model": "rwkv"}, UnsupportedModelError, "rwkv"),
        ({"model": None}, ModelError, "model is missing"),
        ({"tokens": None}, ModelError, "tokens is missing"),
        ({"merges": ["he"]}, ModelError, "'he'"),
        ({"merges": ["q zz"]}, ModelError, "merges"),
        ({"token_type": [1]}, ModelError, "token_type"),
        ({"bos_token_id": 10**6}, ModelError, "bos_token_id"),
        ({"add_bos_token": "yes"}, ModelError, "add_bos_token"),
    ],
)
def test_what_is_wrong_is_named(
    overrides: dict[str, Any], error: type[ModelError], names: str
) -> None:
    with pytest.raises(error, match=names):
        build_gguf_tokenizer(byte_level_metadata(**overrides))


def test_lone_surrogates_are_the_clients_fault(tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, byte_level_metadata())
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("build", [byte_level_metadata, sentencepiece_metadata])
def test_fewest_tokens_is_a_lower_bound(tmp_path: Path, build: Any) -> None:
    tokenizer = _load(tmp_path, build())
    for text in ("hello" * 100, "日本語" * 100, " " * 1000, ""):
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens("x" * 1_000_000) > 10_000


# --- folders ---


def _folder(tmp_path: Path, **files: Any) -> Path:
    source = _load(tmp_path, byte_level_metadata())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(source.json)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_gives_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path, tokenizer_config={"bos_token": "<s>"}))
    assert tokenizer.encode("hel he</s>") == [257, 258, 260]
    assert (tokenizer.bos_token_id, tokenizer.chat_template) == (259, None)


def test_generation_config_names_the_eos_ids(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [260, 261]},
        config={"eos_token_id": 5},
    )
    assert load_tokenizer(folder).eos_token_ids == (260, 261)
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).eos_token_ids == (5,)
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).eos_token_ids == (260,)


def test_bos_and_eos_flags_of_the_config_hold(tmp_path: Path) -> None:
    flags = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    tokenizer = load_tokenizer(_folder(tmp_path, tokenizer_config=flags))
    assert tokenizer.encode("he") == [259, 256, 260]


def test_chat_templates_are_found_in_every_place(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    folder = _folder(tmp_path, chat_template={"chat_template": "file"})
    assert load_tokenizer(folder).require_chat_template().source == "file"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(folder).require_chat_template().source == "d"
    (folder / "chat_template.jinja").write_text(SMALL_TEMPLATE)
    assert load_tokenizer(folder).require_chat_template().source == SMALL_TEMPLATE
    assert load_tokenizer(folder, chat_template="x").require_chat_template().source == "x"


def test_chat_templates_that_cannot_be_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path, tokenizer_config={"chat_template": ["x", {"name": "default"}]})
    assert load_tokenizer(folder).chat_template is None
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(folder)


def test_no_chat_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--chat-template FILE"):
        _load(tmp_path, byte_level_metadata()).require_chat_template()


def test_sentencepiece_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_unknown_decoder_is_unsupported(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(folder)
