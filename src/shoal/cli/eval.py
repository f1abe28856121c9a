"""`shoal eval`: perplexity of a model on a text, and what a change of precision costs.

    shoal eval smollm2-135m --text FILE --quantize int4 \\
        --against smollm2-135m --against-dtype float32

KL divergence, top-1 agreement and the rest are MODEL's against MODEL2, over the same tokens.
`worker/evaluate.py` says what is scored. Knows nothing of what the numbers mean for anyone.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli.eval_report import table, window_bar
from shoal.core.errors import ConfigError
from shoal.core.options import DType, EngineOptions, Kernels, KVCacheDType, Quantization

if TYPE_CHECKING:
    from shoal.core.model_spec import ModelSpec
    from shoal.text.tokenizer import Tokenizer
    from shoal.worker.evaluate import Evaluation, Windows
    from shoal.worker.launch import LaunchedWorker

MAX_TEXT_BYTES = 64 << 20

_AGAINST = "Reference (MODEL2)"


def _against(flag: str, words: str) -> Any:
    return typer.Option(flag, help=words, rich_help_panel=_AGAINST)


def eval_model(
    model: options.Model,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Plain text, UTF-8.")],
    context: Annotated[int, typer.Option("--context", help="Tokens in a window.", min=4)] = 512,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="From window to window; --context by default.", min=1),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Of the text; all by default.", min=1)
    ] = None,
    dtype: options.DType = "auto",
    quantize: options.Quantize = "auto",
    kv_cache_dtype: options.KVCacheDType = "auto",
    kernels: options.Kernels = "auto",
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL2", rich_help_panel=_AGAINST)
    ] = None,
    against_dtype: Annotated[
        DType, _against("--against-dtype", "As --dtype, for MODEL2.")
    ] = "auto",
    against_quantize: Annotated[
        Quantization, _against("--against-quantize", "As --quantize, for MODEL2.")
    ] = "auto",
    against_kv_cache_dtype: Annotated[
        KVCacheDType,
        _against("--against-kv-cache-dtype", "As --kv-cache-dtype, for MODEL2."),
    ] = "auto",
    against_kernels: Annotated[
        Kernels, _against("--against-kernels", "As --kernels, for MODEL2.")
    ] = "auto",
    device: options.Device = "auto",
    num_threads: options.NumThreads = None,
    revision: options.Revision = None,
    hf_token: options.HfToken = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Perplexity of a model on a text; what its precision costs against another."""
    del config
    sides = [_Side(model, dtype, quantize, kv_cache_dtype, kernels)]
    reference = (against_dtype, against_quantize, against_kv_cache_dtype, against_kernels)
    if against is not None:
        sides.append(_Side(against, *reference))
    elif set(reference) != {"auto"}:
        raise ConfigError("a flag --against-... was given; name a second model with --against")
    words = read_text(text)
    from shoal.cli.terminal import find_model

    paths = [find_model(side.model, revision, hf_token).path for side in sides]
    token_ids, bos_token_id = _tokenize(words, paths, sides)
    token_ids = token_ids[:max_tokens]
    from shoal.worker.evaluate import Windows, evaluate

    windows = Windows(num_tokens=len(token_ids), context=context, stride=stride)
    specs = _specs(paths, sides, windows)
    shared = {"device": device, "num_threads": num_threads, "device_share": 1 / len(sides)}
    launched = [_launch(*each, windows, shared) for each in zip(sides, paths, specs, strict=True)]
    started_s = time.perf_counter()
    with window_bar() as progress:
        found = evaluate(
            [each.worker for each in launched],
            token_ids,
            windows,
            bos_token_id=bos_token_id,
            progress=progress,
        )
    report = _report(text, windows, sides, launched, found, time.perf_counter() - started_s)
    print(json.dumps(report, indent=2) if as_json else table(report))


@dataclass(frozen=True, slots=True)
class _Side:
    model: str
    dtype: DType
    quantize: Quantization
    kv_cache_dtype: KVCacheDType
    kernels: Kernels


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, is too large, is no text or has none.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; give a readable file") from error
    if len(raw) > MAX_TEXT_BYTES:
        raise ConfigError(
            f"--text {path} is larger than {MAX_TEXT_BYTES >> 20} MiB; give a part of it"
        )
    try:
        words = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--text {path} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}); give "
            f"plain text"
        ) from error
    if "\0" in words:
        raise ConfigError(f"--text {path} holds NUL bytes, so it is no text; give plain text")
    if not words.strip():
        raise ConfigError(f"--text {path} is empty; give a text of some pages")
    return words


def _tokenize(words: str, paths: list[Path], sides: list[_Side]) -> tuple[list[int], int | None]:
    """The text's tokens, and BOS where the tokenizer begins texts with one."""
    from shoal.text.tokenizer import load_tokenizer

    tokenizers = [load_tokenizer(path) for path in dict.fromkeys(paths)]
    found = [_ids(tokenizer, words) for tokenizer in tokenizers]
    if found[0] != found[-1]:
        first, second = (side.model for side in sides)
        raise ConfigError(
            f"{first} and {second} cut this text into different tokens, so their predictions "
            f"cannot be compared; give two models with the same tokenizer"
        )
    return found[0]


def _ids(tokenizer: Tokenizer, words: str) -> tuple[list[int], int | None]:
    ids = tokenizer.encode(words, add_special_tokens=False)
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token_id if begins else None
    # As one text: BOS before the first token, whatever comes to stand in its place later.
    return ([bos, *ids], bos) if bos is not None else (ids, None)


def _specs(paths: list[Path], sides: list[_Side], windows: Windows) -> list[ModelSpec]:
    from shoal.model.spec import read_spec

    specs = [read_spec(path) for path in paths]
    for side, spec in zip(sides, specs, strict=True):
        if windows.context > spec.max_positions:
            raise ConfigError(
                f"--context is {windows.context}; {side.model} was made for "
                f"{spec.max_positions} tokens at most; lower it"
            )
    if specs[0].vocab_size != specs[-1].vocab_size:
        raise ConfigError(
            f"{sides[0].model} predicts one of {specs[0].vocab_size} tokens and {sides[1].model} "
            f"one of {specs[1].vocab_size}, so they cannot be compared; give two models with the "
            f"same vocabulary"
        )
    return specs


def _launch(
    side: _Side, path: Path, spec: ModelSpec, windows: Windows, shared: dict[str, Any]
) -> LaunchedWorker:
    from shoal.cli.terminal import byte_bar
    from shoal.worker.launch import launch_worker

    engine_options = EngineOptions(
        model_path=str(path),
        dtype=side.dtype,
        quantize=side.quantize,
        kv_cache_dtype=side.kv_cache_dtype,
        kernels=side.kernels,
        max_model_len=windows.context,
        max_num_seqs=1,
        **shared,
    )
    with byte_bar(f"loading {side.model}") as progress:
        return launch_worker(engine_options, spec, say=lambda line: None, progress=progress)


def _report(
    text: Path,
    windows: Windows,
    sides: list[_Side],
    launched: list[LaunchedWorker],
    found: Evaluation,
    evaluate_s: float,
) -> dict[str, Any]:
    models = [
        {
            **asdict(side),
            "precision": worker.dtype,
            "kernels": worker.kernels,
            "device": worker.device,
            "perplexity": perplexity.value,
            "perplexity_error": perplexity.error,
        }
        for side, worker, perplexity in zip(sides, launched, found.perplexities, strict=True)
    ]
    report: dict[str, Any] = {
        "text": str(text),
        "num_tokens": windows.num_tokens,
        "context": windows.context,
        "stride": windows.step,
        "num_windows": len(windows.starts),
        "num_scored": found.perplexities[0].num_tokens,
        "evaluate_s": evaluate_s,
        "model": models[0],
    }
    if found.divergence is not None:
        report["against"] = models[1]
        report["perplexity_ratio"] = models[0]["perplexity"] / models[1]["perplexity"]
        report |= asdict(found.divergence)
    return report
