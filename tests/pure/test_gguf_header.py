"""GGUF headers: values, offsets, and every way a file can be cut short or lie."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from shoal.core.errors import ModelError, UnsupportedModelError
from shoal.core.gguf_header import read_gguf_header
from shoal.core.gguf_tokens import CONTROL, NORMAL, gguf_eos_token_ids
from text_models import gguf_bytes

METADATA = {
    "general.architecture": "llama",
    "flag": True,
    "count": 7,
    "rate": 0.5,
    "names": ["a", "é", ""],
    "ids": [1, 2, 3],
    "flags": [True, False],
    "nested": [["a"], ["b", "c"]],
}


def _write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def test_reads_what_was_written(tmp_path: Path) -> None:
    tensors = [("a.weight", (4, 2)), ("b.weight", (3,))]
    header = read_gguf_header(_write(tmp_path, gguf_bytes(METADATA, tensors)))
    plain = {
        key: list(value) if key in ("ids", "flags") else value
        for key, value in header.metadata.items()
    }
    assert plain == METADATA
    assert header.data_offset % 32 == 0
    assert [(t.name, t.dims, t.offset - header.data_offset) for t in header.tensors] == [
        ("a.weight", (4, 2), 0),
        ("b.weight", (3,), 64),
    ]


def test_every_truncation_is_a_model_error(tmp_path: Path) -> None:
    whole = gguf_bytes(METADATA, [("a.weight", (4, 2))])
    end_of_header = read_gguf_header(_write(tmp_path, whole)).data_offset
    last_field = len(whole[:end_of_header].rstrip(b"\0"))
    for length in range(last_field):
        with pytest.raises(ModelError):
            read_gguf_header(_write(tmp_path, whole[:length]))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"PK\x03\x04" + bytes(100), "GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "metadata entries"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64), "2|bytes"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**60),
            "array elements",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIQ", 1, b"k", 99, 0), "type 99"),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q1sI", 1, b"k", 9)
            + struct.pack("<IQ", 9, 1) * 50,
            "nested",
        ),
        (gguf_bytes({"general.alignment": 7}), "alignment"),
    ],
)
def test_lies_are_named(tmp_path: Path, content: bytes, names: str) -> None:
    with pytest.raises(ModelError, match=names):
        read_gguf_header(_write(tmp_path, content))


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    content = gguf_bytes({"aa": 1, "ab": 2}).replace(b"ab", b"aa")
    with pytest.raises(ModelError, match="twice"):
        read_gguf_header(_write(tmp_path, content))


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    content = gguf_bytes({}, [("a.weight", (4, 2)), ("a.weight", (4, 2))])
    with pytest.raises(ModelError, match="two tensors have one name"):
        read_gguf_header(_write(tmp_path, content))


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_are_unsupported(tmp_path: Path, version: int) -> None:
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        read_gguf_header(_write(tmp_path, b"GGUF" + struct.pack("<IQQ", version, 0, 0)))


def test_eos_ids_come_from_keys_and_from_control_tokens() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<eos>", "a", "<end_of_turn>", "</s>"],
        "tokenizer.ggml.token_type": [CONTROL, NORMAL, CONTROL, NORMAL],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 99,  # outside the vocabulary
    }
    assert gguf_eos_token_ids(metadata) == (2, 0)
    del metadata["tokenizer.ggml.token_type"]
    assert gguf_eos_token_ids(metadata) == (2,), "a turn's end, which no other token is called"
