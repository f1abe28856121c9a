"""Packed weights kept between starts: the same bytes, or none at all."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from paging import run_mixed_steps

from shoal.kernels.cpu.step import Session
from shoal.model import packed_cache, packed_weights
from shoal.model.packed_cache import PackedCache
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "_PIECE_BYTES", 1000)
    return tmp_path / "cache" / "packed"


def _cache(tmp_path: Path, *parts: object) -> PackedCache:
    checkpoint = tmp_path / "model.gguf"
    if not checkpoint.exists():
        checkpoint.write_bytes(b"weights")
    return PackedCache("fingerprint", checkpoint, parts)


def _wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "shoal-keep":
            thread.join()


def _kept(tmp_path: Path, data: torch.Tensor) -> bool:
    found = torch.zeros_like(data)
    whole = _cache(tmp_path).read_into(found)
    assert found.equal(data) if whole else True
    return whole


DATA = torch.arange(2500).to(torch.uint8)


def test_what_is_kept_is_what_was_given(tmp_path: Path) -> None:
    assert not _kept(tmp_path, DATA)
    _cache(tmp_path).keep(DATA)
    _wait()
    assert _kept(tmp_path, DATA)
    assert not _cache(tmp_path, "int8").read_into(DATA.clone())
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    assert not _kept(tmp_path, DATA)
    assert not PackedCache("", tmp_path / "model.gguf", ()).read_into(DATA.clone())


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "empty"])
def test_a_damaged_file_is_removed(
    damage: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _cache(tmp_path).keep(DATA)
    _wait()
    (path,) = folder.glob("*.bin")
    content = bytearray(path.read_bytes())
    content[-700] ^= 1
    path.write_bytes(
        {"cut": content[:-1], "flipped": content, "header": b"{" + content, "empty": b""}[damage]
    )
    assert not _kept(tmp_path, DATA)
    assert not path.exists()
    assert "are not used" in caplog.text
    _cache(tmp_path).keep(DATA)
    _wait()
    assert _kept(tmp_path, DATA)


def test_few_are_kept_and_the_dead_writers_are_cleaned_up(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "_MAX_FILES", 2)
    _cache(tmp_path).keep(DATA)
    _wait()
    (name,) = (path.name for path in folder.glob("*.bin"))
    (folder / f".{name}.999999999").write_bytes(b"half")
    for part in range(3):
        _cache(tmp_path, part).keep(DATA)
        _wait()
    assert len(list(folder.glob("*.bin"))) == 2
    _cache(tmp_path).keep(DATA)
    _wait()
    assert not (folder / f".{name}.999999999").exists()


def test_a_disk_that_takes_nothing_fails_no_start(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir()
    folder.write_text("not a folder")
    _cache(tmp_path).keep(DATA)
    _wait()
    assert "could not be kept" in caplog.text


def test_a_second_start_computes_the_same(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_weights, "_WORTH_KEEPING_S", 0.0)
    caplog.set_level(logging.INFO)
    checkpoint = tiny_checkpoint(
        tmp_path / "model", "Qwen3ForCausalLM", 8, 2, hidden_size=64, attention_bias=True
    )

    def logits() -> list[torch.Tensor]:
        decoder = load_decoder(
            checkpoint,
            read_spec(checkpoint),
            device=torch.device("cpu"),
            dtype=torch.float32,
            kernels=Session(2),
            quantize="int8",
            fingerprint="f",
        )
        _wait()
        sequences = run_mixed_steps(decoder)
        return [each for sequence in sequences for each in sequence.logits.values()]

    first = logits()
    assert len(list(folder.glob("*.bin"))) == 1
    assert "kept at an earlier start" not in caplog.text
    assert all(one.equal(other) for one, other in zip(first, logits(), strict=True))
    assert "kept at an earlier start" in caplog.text
