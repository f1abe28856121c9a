"""The sampling a checkpoint recommends: as files spell it, and what no request could ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.core.errors import ModelError
from shoal.core.request import SamplingParams
from shoal.model.generation_config import read_default_sampling


def _written(folder: Path, config: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 50.0, "temperature": None}, {"top_k": 50}),
        ({"top_k": -1}, {"top_k": 0}),
        ({}, {}),
    ],
)
def test_what_is_recommended(config: Any, found: dict[str, Any], tmp_path: Path) -> None:
    assert read_default_sampling(_written(tmp_path, config)) == found
    SamplingParams(**found)


def test_nothing_is_recommended_without_the_file(tmp_path: Path) -> None:
    assert read_default_sampling(tmp_path) == {}
    assert read_default_sampling(tmp_path / "model.gguf") == {}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"temperature": "hot"}, "temperature holds 'hot'"),
        ({"temperature": True}, "temperature holds 'True'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": float("nan")}, "top_k holds 'nan'"),
        ({"top_k": float("inf")}, "top_k holds 'inf'"),
        ({"min_p": 7}, "min_p is 7"),
        ([], "holds list, no object"),
    ],
)
def test_what_no_request_may_ask_for_is_told_at_once(
    config: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json:? .*{words}|json {words}"):
        read_default_sampling(_written(tmp_path, config))


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match="is not JSON"):
        read_default_sampling(tmp_path)
