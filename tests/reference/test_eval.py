"""`shoal eval`: its numbers against transformers and numpy, its words, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from checkpoints import reference_logits, reference_model, tiny_checkpoint
from tokenizers import decoders, models, pre_tokenizers

from shoal.cli import eval as eval_command
from shoal.cli.main import main
from shoal.core.errors import ConfigError, ModelError
from shoal.model.quality import TextScore
from shoal.text.token_bytes import byte_of_character
from shoal.worker import evaluate
from shoal.worker.evaluate import Windows

VOCAB_SIZE = 300
BOS = 256

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that are alike, one whose vocabulary is wider, one whose tokenizer adds BOS."""
    root = tmp_path_factory.mktemp("models")
    tiny_checkpoint(root / "one", vocab_size=VOCAB_SIZE)
    _disturb(root / "one", root / "two")
    tiny_checkpoint(root / "wide", vocab_size=VOCAB_SIZE + 4)
    for name in ("one", "two", "wide"):
        _save_tokenizer(root / name, adds_bos=False)
    shutil.copytree(root / "one", root / "bos")
    _save_tokenizer(root / "bos", adds_bos=True)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = random.Random(0)
    path.write_text("".join(rng.choice("abcdefg hij\n") for _ in range(330)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`shoal eval ARGS` in this process; (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        arguments = [str(arg) for arg in args]
        monkeypatch.setattr(sys, "argv", ["shoal", "eval", "--dtype", "float32", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    num_threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("step_tokens", [512, 20])
@pytest.mark.parametrize(
    ("name", "context", "stride"), [("one", 64, 64), ("bos", 64, 64), ("one", 61, 40)]
)
def test_perplexity_equals_transformers(
    name: str,
    context: int,
    stride: int,
    step_tokens: int,
    checkpoints: dict[str, Path],
    text: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "STEP_TOKENS", step_tokens)
    folder = checkpoints[name]
    code, out, err = run(folder, "--text", text, "--context", context, "--stride", stride, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    logprobs = _expected_logprobs(folder, text, context, stride, adds_bos=name == "bos")
    chosen = np.concatenate([rows[range(len(rows)), targets] for rows, targets in logprobs])
    assert report["num_windows"] == len(logprobs) > 3
    assert report["num_scored"] == len(chosen)
    perplexity = np.exp(-chosen.mean())
    assert report["model"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * chosen.std(ddof=1) / len(chosen) ** 0.5
    assert report["model"]["perplexity_error"] == pytest.approx(error, rel=1e-3)
    assert "kl_mean" not in report and "against" not in report


def test_divergence_equals_numpy(checkpoints: dict[str, Path], text: Path, run: Run) -> None:
    one, two = checkpoints["one"], checkpoints["two"]
    _, out, _ = run(
        *(one, "--text", text, "--context", 64, "--json"),
        *("--against", two, "--against-dtype", "float32"),
    )
    report = json.loads(out)
    ours, reference = (
        _expected_logprobs(folder, text, 64, 64, adds_bos=False) for folder in (one, two)
    )
    p = np.concatenate([rows for rows, _ in ours]).astype(np.float64)
    q = np.concatenate([rows for rows, _ in reference]).astype(np.float64)
    targets = np.concatenate([targets for _, targets in ours])
    kl = (np.exp(q) * (q - p)).sum(-1)
    picks = np.arange(len(targets)), targets
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": np.sort(kl)[(len(kl) - 1) // 2],
        "kl_p99": np.sort(kl)[int(np.ceil(0.99 * len(kl))) - 1],
        "kl_max": kl.max(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
        "mean_abs_logprob_difference": np.abs(p[picks] - q[picks]).mean(),
        "perplexity_ratio": np.exp(q[picks].mean() - p[picks].mean()),
    }
    found = {name: report[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3)
    # The two must really differ, or directions and indices could be mistaken unseen.
    assert kl.mean() > 0.1 and 0 < expected["top1_agreement"] < 1
    assert abs((np.exp(p) * (p - q)).sum(-1).max() / kl.max() - 1) > 0.01


def test_a_model_does_not_part_from_itself(
    checkpoints: dict[str, Path], text: Path, run: Run
) -> None:
    one = checkpoints["one"]
    same = ("--against", one, "--against-dtype", "float32")
    _, out, _ = run(one, "--text", text, "--context", 64, "--json", *same)
    report = json.loads(out)
    assert report["kl_max"] < 1e-6
    assert report["top1_agreement"] == 1
    assert report["perplexity_ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "largest"),
    [(("--kv-cache-dtype", "int8"), 0.05), (("--dtype", "bfloat16"), 0.05)],
    ids=["kv-int8", "bfloat16"],
)
def test_what_precision_costs_is_seen(
    flags: tuple[str, ...], largest: float, checkpoints: dict[str, Path], text: Path, run: Run
) -> None:
    one = checkpoints["one"]
    same = ("--against", one, "--against-dtype", "float32")
    _, out, _ = run(one, "--text", text, "--context", 64, "--json", *flags, *same)
    report = json.loads(out)
    assert 1e-6 < report["kl_mean"] < largest
    assert report["against"]["kv_cache_dtype"] == "auto"
    assert report["model"][flags[0].strip("-").replace("-", "_")] == flags[1]


def test_the_table_says_what_the_json_does(
    checkpoints: dict[str, Path], text: Path, run: Run
) -> None:
    args = (checkpoints["one"], "--text", text, "--context", 64, "--max-tokens", 200)
    against = ("--against", checkpoints["two"], "--against-dtype", "float32")
    report = json.loads(run(*args, *against, "--json")[1])
    code, out, err = run(*args, *against)
    assert (code, err) == (0, "")
    assert report["num_tokens"] == 200
    assert f"{report['num_scored']} tokens scored, in 3 windows of 64" in out
    for side in ("model", "against"):
        assert f"{report[side]['perplexity']:.4f} ± " in out
        assert report[side]["precision"] in out
    for line in (
        f"ratio           {report['perplexity_ratio']:.4f}",
        f"KL divergence   {report['kl_mean']:.3g} mean",
        f"top-1 agreement {report['top1_agreement']:.2%}",
        f"mean |Δ log p|  {report['mean_abs_logprob_difference']:.3g}",
    ):
        assert line in out
    code, out, _ = run(*args)
    assert code == 0 and "KL" not in out


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (None, [], "No such file"),
        (b"", [], "is empty"),
        (b" \n\t ", [], "is empty"),
        (b"abc\xff\xfe", [], "not UTF-8 (byte 3 is 0xff)"),
        (b"abc\0def" * 100, [], "NUL"),
        (b"a" * 63, [], "63 tokens, and a window takes 64"),
        (b"a" * 200, ["--max-tokens", 50], "50 tokens, and a window takes 64"),
        (b"a" * 200, ["--stride", 31], "must be 32 to 64"),
        (b"a" * 200, ["--stride", 65], "must be 32 to 64"),
        (b"a" * 900, ["--context", 512], "made for 256"),
        (b"a" * 200, ["--against-quantize", "int4"], "--against"),
    ],
)
def test_what_is_refused(
    content: bytes | None,
    flags: list[Any],
    words: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    run: Run,
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(checkpoints["one"], "--text", path, "--context", 64, *flags)
    assert (code, out) == (1, "")
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(("other", "words"), [("bos", "different tokens"), ("wide", "one of 304")])
def test_models_that_cannot_be_compared(
    other: str, words: str, checkpoints: dict[str, Path], text: Path, run: Run
) -> None:
    args = (checkpoints["one"], "--text", text, "--context", 64, "--against", checkpoints[other])
    code, _, err = run(*args)
    assert code == 1 and words in err


def test_a_text_too_large_is_refused_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_command, "MAX_TEXT_BYTES", 1 << 20)
    (tmp_path / "large").write_bytes(b"a" * (1 << 20))
    assert len(eval_command.read_text(tmp_path / "large")) == 1 << 20
    (tmp_path / "larger").write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        eval_command.read_text(tmp_path / "larger")
    with pytest.raises(ConfigError, match="directory"):
        eval_command.read_text(tmp_path)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    with pytest.raises(ModelError, match="finite"):
        TextScore().add(logits, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride", "starts"),
    [
        (64, 64, None, [0]),
        (127, 64, None, [0]),
        (128, 64, None, [0, 64]),
        (128, 64, 32, [0, 32, 64]),
        (5, 5, 3, [0]),
    ],
)
def test_windows(num_tokens: int, context: int, stride: int | None, starts: list[int]) -> None:
    windows = Windows(num_tokens=num_tokens, context=context, stride=stride)
    assert list(windows.starts) == starts
    with pytest.raises(ConfigError, match="at least 4"):
        Windows(num_tokens=10, context=3)


def _expected_logprobs(
    folder: Path, text: Path, context: int, stride: int, *, adds_bos: bool
) -> list[tuple[np.ndarray[Any, Any], list[int]]]:
    """Of each window: transformers' log-probabilities of scored positions, and their tokens."""
    model = reference_model(folder)
    token_ids = [BOS] * adds_bos + list(text.read_bytes())
    found = []
    for start in range(0, len(token_ids) - context + 1, stride):
        window = token_ids[start : start + context]
        targets = window[context // 2 + 1 :]
        if adds_bos:
            window = [BOS, *window[1:]]
        logits = reference_logits(model, window)[context // 2 : -1]
        found.append((logits.log_softmax(-1).numpy(), targets))
    return found


def _disturb(source: Path, target: Path) -> None:
    """The same model with noise on its weights: like it, and not the same."""
    model = reference_model(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
    model.save_pretrained(target)


def _save_tokenizer(folder: Path, *, adds_bos: bool) -> None:
    """Every byte is the token of its number; 256 begins a text."""
    vocab = {**byte_of_character(), "<s>": BOS}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "add_bos_token": adds_bos, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
