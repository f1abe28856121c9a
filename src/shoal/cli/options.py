"""Flags that several commands share, and where their values come from.

    command line  over  --config FILE  over  SHOAL_<FLAG> in the environment  over  default

Names follow vLLM where the meaning is the same. A command's parameter is called as its
flag, with underscores. Knows nothing of what the values do.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.core.errors import ConfigError
from shoal.core.options import ActivationFormat as ActivationFormatName
from shoal.core.options import Batching as BatchingName
from shoal.core.options import DType as DTypeName
from shoal.core.options import Kernels as KernelsName
from shoal.core.options import KVCacheDType as KVCacheDTypeName
from shoal.core.options import Quantization as QuantizationName
from shoal.core.split import KVSplit as KVSplitName

if TYPE_CHECKING:
    from shoal.plan_file import PlanFile

DEFAULT_MODEL = "smollm2-135m"

_ENGINE, _HUB, _SERVER, _SAMPLING = "Engine", "Hugging Face hub", "Server", "Sampling"


def read_config_file(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Values from a YAML or JSON file whose keys are flag names, with - or _.

    Args:
        types: parameter name → the type its value must have.

    Raises:
        ConfigError: unreadable, not a mapping, an unknown key, or a value of a wrong type.
    """
    import yaml

    try:
        read = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a readable file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML or JSON: {error}; mend it") from error
    if not isinstance(read, dict | None):
        raise ConfigError(
            f"--config {path} holds a {type(read).__name__}; write lines such as `port: 8000`"
        )
    values: dict[str, Any] = {}
    for key, value in (read or {}).items():
        name = str(key).replace("-", "_")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {_key(near[0])}?" if near else "remove it"
            raise ConfigError(f"{path}: unknown key {str(key)!r}; {hint}")
        if name in values:
            raise ConfigError(f"{path}: {_key(name)} stands there twice; remove one")
        values[name] = _checked(path, name, value, types[name])
    return values


def read_environment(types: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Values of SHOAL_<FLAG> variables, as text; lists are split at commas."""
    values: dict[str, Any] = {}
    for name, expected in types.items():
        text = environ.get(f"SHOAL_{name.upper()}")
        if text:
            values[name] = text.split(",") if _is_list(expected) else text
    return values


def template_text(path: Path | None) -> str | None:
    """What --chat-template names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return None if path is None else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: {error}; give a Jinja file") from error


def plan_and_model(plan: Path | None, model: str | None) -> tuple[PlanFile | None, str]:
    """What --plan holds, and the model to run: as named, else the plan's, else the default.

    Raises:
        ConfigError: a plan that is malformed.
    """
    from shoal.plan_file import read_plan

    file = read_plan(plan) if plan is not None else None
    return file, model or (file.model if file is not None else None) or DEFAULT_MODEL


def _use_settings(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's and the environment's values the command's defaults."""
    types = _parameter_types(ctx)
    from_file = read_config_file(path, types) if path is not None else {}
    ctx.default_map = {**read_environment(types, os.environ), **from_file}
    return path


def _parameter_types(ctx: typer.Context) -> dict[str, Any]:
    function = inspect.unwrap(ctx.command.callback or _use_settings)
    hints = typing.get_type_hints(function)
    return {name: kind for name, kind in hints.items() if name not in ("return", "config", "ctx")}


def _checked(path: Path, name: str, value: Any, expected: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if _is_list(expected) and isinstance(value, str):
        value = [value]
    try:
        # By way of JSON, so that a path may be text, but "8000" is no number.
        TypeAdapter(expected).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {_key(name)} is {value!r}; it must be {_in_words(expected)} "
            f"({error.errors()[0]['msg'].lower()})"
        ) from error
    return value


def _key(name: str) -> str:
    return name.replace("_", "-")


def _is_list(expected: Any) -> bool:
    return any(typing.get_origin(kind) is list for kind in (expected, *typing.get_args(expected)))


def _in_words(expected: Any) -> str:
    if typing.get_origin(expected) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(expected))
    kinds = [kind for kind in typing.get_args(expected) if kind is not type(None)] or [expected]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kinds[0], "a list" if _is_list(expected) else "text")


def _option(flag: str, words: str, panel: str, **more: Any) -> Any:
    return typer.Option(flag, help=words, rich_help_panel=panel, **more)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A catalogue name, a safetensors folder, a .gguf file or a Hugging Face id.",
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help=f"As a name, a folder, a .gguf file or a Hugging Face id; {DEFAULT_MODEL}.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML or JSON; keys are flag names. The command line wins over it.",
        is_eager=True,
        callback=_use_settings,
    ),
]

Revision = Annotated[
    str | None, _option("--revision", "Branch, tag or commit of the model's repo.", _HUB)
]
HfToken = Annotated[
    str | None, _option("--hf-token", "For gated and private models (or set HF_TOKEN).", _HUB)
]

DType = Annotated[DTypeName, _option("--dtype", "Precision of weights and KV.", _ENGINE)]
Quantize = Annotated[
    QuantizationName,
    _option("--quantize", "Precision of the large weights; auto: as the model has them.", _ENGINE),
]
KVCacheDType = Annotated[
    KVCacheDTypeName, _option("--kv-cache-dtype", "Precision of the KV cache.", _ENGINE)
]
Kernels = Annotated[
    KernelsName, _option("--kernels", "auto: the fastest this machine has.", _ENGINE)
]
Device = Annotated[str, _option("--device", "auto, cpu, cuda or cuda:N.", _ENGINE)]
MaxModelLen = Annotated[
    int | None, _option("--max-model-len", "Prompt and output tokens at most.", _ENGINE, min=1)
]
MaxNumSeqs = Annotated[
    int | None,
    _option(
        "--max-num-seqs",
        "Sequences running at once at most; default: the plan's, or 64.",
        _ENGINE,
        min=1,
    ),
]
MaxNumBatchedTokens = Annotated[
    int | None, _option("--max-num-batched-tokens", "Tokens in one step at most.", _ENGINE, min=1)
]
Batching = Annotated[
    BatchingName,
    _option(
        "--batching",
        "even: prompts are cut so that running streams go on evenly; continuous: they are not; "
        "article: continuous, and batches of rate x 1 s at most.",
        _ENGINE,
    ),
]
TpotTarget = Annotated[
    float | None,
    _option(
        "--tpot-target",
        "Seconds per token that running streams keep beside prompts; the SLO's, or little more "
        "than they take alone.",
        _ENGINE,
        min=0,
    ),
]
KvCacheMemoryBytes = Annotated[
    int | None, _option("--kv-cache-memory-bytes", "Memory for the KV cache.", _ENGINE, min=1)
]
WeightsMemoryBytes = Annotated[
    int | None,
    _option(
        "--weights-memory-bytes",
        "Memory for weights; layers beyond it come from disk (GPU: from the host) in every step.",
        _ENGINE,
        min=1,
    ),
]
EnablePrefixCaching = Annotated[
    bool,
    _option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        "Reuse the KV of prompt beginnings.",
        _ENGINE,
    ),
]
MaxWaiting = Annotated[
    int | None,
    _option(
        "--max-waiting",
        "Requests that may queue; more get a 429. 256 for each replica by default, 2,048 before "
        "upstreams.",
        _ENGINE,
        min=1,
    ),
]
NumThreads = Annotated[
    int | None, _option("--num-threads", "CPU threads; all by default.", _ENGINE, min=1)
]
Plan = Annotated[
    Path | None,
    _option("--plan", "YAML: which devices run which part of the model.", _ENGINE, metavar="FILE"),
]
Cluster = Annotated[
    Path | None,
    _option(
        "--cluster",
        "Plan for these devices; what `shoal probe` kept, if it found several. With --plan: how "
        "fast they are, for a router to begin with.",
        _ENGINE,
        metavar="FILE",
    ),
]
TensorParallelSize = Annotated[
    int,
    _option("--tensor-parallel-size", "Devices that share every layer.", _ENGINE, min=1),
]
PipelineParallelSize = Annotated[
    int,
    _option("--pipeline-parallel-size", "Stages that the layers are cut into.", _ENGINE, min=1),
]
KVSplit = Annotated[
    KVSplitName,
    _option(
        "--kv-split",
        "What of a sequence's KV each device that shares a layer keeps: its heads, or some tokens.",
        _ENGINE,
    ),
]
ActivationFormat = Annotated[
    ActivationFormatName,
    _option(
        "--activation-format",
        "Of what devices send each other; auto: rounded where a slow link makes it worth it.",
        _ENGINE,
    ),
]
ExpertRedeal = Annotated[
    bool,
    _option(
        "--expert-redeal/--no-expert-redeal",
        "Move experts between devices as load and speed show.",
        _ENGINE,
    ),
]
ChatTemplate = Annotated[
    Path | None, _option("--chat-template", "Jinja file to use for the model's own.", _ENGINE)
]

Record = Annotated[
    Path | None,
    _option(
        "--record",
        "Folder for recordings of what router and engines decide, token ids included, for "
        "`shoal replay`.",
        _SERVER,
    ),
]

DataParallelSize = Annotated[
    int, _option("--data-parallel-size", "Replicas of the engine.", _SERVER, min=1)
]
ServedModelName = Annotated[
    list[str] | None,
    _option("--served-model-name", "Name in the API; may be repeated.", _SERVER),
]
ApiKey = Annotated[
    list[str] | None,
    _option("--api-key", "Key that clients must send; may be repeated.", _SERVER),
]
Host = Annotated[str, _option("--host", "Address to listen on.", _SERVER)]
Port = Annotated[int, _option("--port", "Port to listen on.", _SERVER, min=0, max=65535)]
DrainTimeout = Annotated[
    float, _option("--drain-timeout", "Seconds for running requests on SIGTERM.", _SERVER, min=0)
]
RequestTimeout = Annotated[
    float | None, _option("--request-timeout", "Seconds a request may take.", _SERVER, min=0)
]

MaxTokens = Annotated[
    int | None, _option("--max-tokens", "Tokens to generate at most.", _SAMPLING, min=1)
]
Temperature = Annotated[
    float, _option("--temperature", "0 always takes the likeliest token.", _SAMPLING, min=0)
]
TopP = Annotated[
    float, _option("--top-p", "Likeliest tokens up to this share.", _SAMPLING, min=0, max=1)
]
TopK = Annotated[int, _option("--top-k", "The k likeliest tokens; 0: all.", _SAMPLING, min=0)]
Seed = Annotated[
    int | None, _option("--seed", "The same seed gives the same text.", _SAMPLING, min=0)
]
Stop = Annotated[
    list[str] | None, _option("--stop", "Text that ends the output; may be repeated.", _SAMPLING)
]

Json = Annotated[bool, typer.Option("--json", help="Say it as JSON.")]
