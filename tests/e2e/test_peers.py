"""`benchmarks/peers.py`: its worker and driver on a tiny model, and what its report says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shoal.text.token_bytes import byte_of_character

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
POSITIONS = 512


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other from their own folder; so do these tests."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "reference")
        checkpoints = importlib.import_module("checkpoints")
        checkpoints.tiny_checkpoint(folder, max_position_embeddings=POSITIONS, vocab_size=256)
    tokenizer = Tokenizer(models.BPE(vocab=dict(byte_of_character()), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_shoal_has_its_numbers_and_a_peer_that_cannot_run_has_its_reason(
    tiny_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--quick", "--threads", "1"]
    command += ["--model", str(tiny_model), "--only", "shoal-bf16,llama-q4_0"]
    command += ["--envs", str(tmp_path / "envs"), "--output", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr

    (file,) = (tmp_path / "results").glob("peers_quick_*.json")
    report = json.loads(file.read_text())
    assert report["failures"] == {
        "llama q4_0": "reads GGUF files only; name a .gguf file as --model"
    }
    assert set(report["summary"]) == {"shoal bf16", "llama q4_0"}
    numbers = report["summary"]["shoal bf16"]
    assert set(numbers) == {
        "decode_tokens_per_s",
        "batch_tokens_per_s",
        "prefill_tokens_per_s",
        "peak_rss_mib",
        "start_s",
        "growth_batch_tokens_per_s",
        "crowd_tokens_per_s",
        "step_short_ms",
        "step_long_ms",
    }
    assert all(each["min"] > 0 for each in numbers.values())
    assert report["import_torch_s"]["median"] > 0
    # A process with torch in it, and no more than a tiny model on top.
    assert 100 < numbers["peak_rss_mib"]["median"] < 2000
    assert report["weight_bytes"]["shoal bf16"] == 2 * num_matrix_weights(tiny_model)

    (page,) = (tmp_path / "results").glob("peers_quick_*.md")
    text = page.read_text()
    assert "| shoal bf16 | " in text
    assert "- llama q4_0: not run: reads GGUF files only" in text
    assert str(POSITIONS - 49) in text  # the long context, cut to what the model holds


def num_matrix_weights(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    hidden, ffn, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries, keys = (
        config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * ffn
    # Not tied: the head counts, the embedding is looked up.
    return int(config["num_hidden_layers"] * layer + vocab * hidden)


@pytest.mark.usefixtures("benchmarks")
def test_a_worker_that_cannot_start_or_takes_too_long_is_a_reason() -> None:
    turns = importlib.import_module("peer_turns")
    python = Path(sys.executable)
    crashed = turns.run_turn(python, "no_such_worker.py", {}, 30.0)
    assert "no_such_worker.py" in crashed["error"]
    # It waits for a job's line that is too long in coming: the interpreter alone takes longer.
    late = turns.run_turn(python, "shoal_worker.py", {}, 0.001)
    assert late == {"error": "over 0 s"}


def run(num_prompts: int, num_tokens: int, first_s: float | None, last_s: float) -> dict[str, Any]:
    return {
        "num_prompts": num_prompts,
        "num_tokens": num_tokens,
        "first_s": first_s,
        "last_s": last_s,
        "ids": [],
    }


def common_turn(
    variant: str, single_s: float, batch_s: float, rss: int = 1 << 30
) -> dict[str, Any]:
    return {
        "variant": variant,
        "task_set": "common",
        "start_s": 1.0,
        "peak_rss_bytes": rss,
        "tasks": {
            "single": [run(1, 101, 0.5, 0.5 + single_s)],
            "batch": [run(16, 128, None, batch_s)],
            "prefill": [run(1, 1, each, each) for each in (0.25, 0.5, 5.0)],
        },
    }


@pytest.mark.usefixtures("benchmarks")
def test_summary_is_the_median_of_rounds() -> None:
    report = importlib.import_module("peer_report")
    turns = [common_turn("shoal bf16", single_s, 2.048) for single_s in (1.0, 4.0, 2.0)]
    turns.append({"variant": "llama q4_0", "task_set": "common", "error": "broke"})
    summary = report.summarise(turns, prefill_tokens=512)
    assert summary["llama q4_0"] == {}
    ours = summary["shoal bf16"]
    # 100 steps between 101 tokens.
    assert ours["decode_tokens_per_s"] == {"median": 50.0, "min": 25.0, "max": 100.0}
    assert ours["batch_tokens_per_s"]["median"] == pytest.approx(1000)
    assert ours["prefill_tokens_per_s"]["median"] == 1024.0


@pytest.mark.usefixtures("benchmarks")
def test_targets_take_the_smaller_bound_and_the_best_peer() -> None:
    report = importlib.import_module("peer_report")
    turns = [
        common_turn("shoal int4", single_s=1.0, batch_s=2.0, rss=800 << 20),
        common_turn("llama q4_0", single_s=2.0, batch_s=4.0, rss=400 << 20),
        common_turn("openvino q8_0", single_s=9.0, batch_s=2.2, rss=900 << 20),
    ]
    turns.append(
        {
            "variant": "shoal int4",
            "task_set": "growth",
            "tasks": {
                "short": [run(1, 11, 0.0, 1.0)],
                "long": [run(1, 11, 0.0, 1.6)],
                "batch": [run(16, 128, None, 2.0)],
                "crowd": [run(64, 128, None, 7.0)],
            },
        }
    )
    summary = report.summarise(turns, prefill_tokens=512)
    rows = {
        row["what"]: row
        for row in report.targets(summary, {"shoal int4": 100.0}, import_torch_s=0.1)
    }

    def only(part: str) -> dict[str, Any]:
        (row,) = [row for what, row in rows.items() if part in what]
        return row

    # 1.6 x 50 tok/s of llama is more than 75 % of the floor's 100: the floor decides.
    assert only("decode, shoal int4")["need"] == pytest.approx(75.0)
    assert only("decode, shoal int4")["got"] == pytest.approx(100.0)
    assert only("decode, shoal bf16")["ok"] is None
    # The best peer did 2048 tokens in 2.2 s: 1.2 times that is out of reach.
    assert only("16 requests, tok/s")["need"] == pytest.approx(1.2 * 2048 / 2.2)
    assert only("16 requests, tok/s")["ok"] is False
    assert only("step at the long")["got"] == pytest.approx(1.6)
    assert only("step at the long")["ok"] is False
    assert only("64 requests over 16")["got"] == pytest.approx(4 * 2 / 7)
    assert only("64 requests over 16")["ok"] is True
    assert only("peak RSS")["ok"] is False
    assert only("start to first")["ok"] is True


@pytest.mark.usefixtures("benchmarks")
def test_prompts_are_the_same_for_all_and_new_each_round() -> None:
    tasks = importlib.import_module("peer_tasks")
    sizes = tasks.Sizes().at_most(2048)
    assert sizes.long_context < 2048
    first, again, other = (
        tasks.tasks_of("growth", sizes, 49152, seed) for seed in ("0/0", "0/0", "0/1")
    )
    assert first == again
    assert first["tasks"] != other["tasks"]
    prompts = [prompt for task in first["tasks"] for repeat in task["repeats"] for prompt in repeat]
    ids = {token for prompt in prompts for token in prompt}
    assert min(ids) >= 1000
    assert max(ids) < 49152 * 0.8
    # All 64 at once, and the long one alone, fit the room that is asked for.
    assert first["kv_tokens"] >= 64 * (sizes.batch_prompt + sizes.batch_tokens)
    assert first["max_len"] >= sizes.long_context + sizes.step_tokens
