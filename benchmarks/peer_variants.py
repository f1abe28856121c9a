"""Which engines run, in which precision, on which file of the same weights.

    engine   one program; name of its environment and worker
    variant  an engine in one precision: a row of the table

Where a precision has no instructions on this CPU, the engine's better one runs instead: bf16
without them is emulated, slowly, by PyTorch and so by transformers and vLLM.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from peer_environments import make_environment
from safetensors import safe_open

from shoal.model.spec import read_spec
from shoal.model.store import resolve

HERE = Path(__file__).parent

BITS = {"bf16": 16.0, "int8": 8.5, "int4": 4.5}
"""Bits a weight takes where the file itself does not say: a group of 32 shares an fp16 scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A row of the table.

    Attributes:
        weights: "BF16", "F16", "Q8_0", "Q4_0" (GGUF) or "folder" (safetensors in bf16).
        options: of the engine.
        growth: also runs the tasks that grow.
        default: runs when its engine is asked for; else only by its own name.
    """

    engine: str
    precision: str
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    growth: bool = False
    default: bool = True

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"


def variants_for(model: Path, has_bf16: bool) -> list[Variant]:
    return [
        *_shoal_variants(model),
        *(
            Variant(engine="llama", precision=weights.lower(), weights=weights)
            for weights in ("BF16", "Q8_0", "Q4_0")
        ),
        *(
            # Its GGUF reader refuses BF16.
            Variant(engine="openvino", precision=weights.lower(), weights=weights)
            for weights in ("F16", "Q8_0", "Q4_0")
        ),
        *(
            Variant(
                engine=engine,
                precision=precision,
                weights="folder",
                options={"dtype": dtype},
                default=has_bf16 == (precision == "bf16"),
            )
            for engine in ("transformers", "vllm")
            for precision, dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
        ),
    ]


def _shoal_variants(model: Path) -> list[Variant]:
    """The very files the peers read; a folder is quantised as it is loaded."""
    if model.is_dir():
        rows: Sequence[tuple[str, str, dict[str, Any]]] = (
            ("bf16", "folder", {"dtype": "bfloat16"}),
            ("int8", "folder", {"quantize": "int8"}),
            ("int4", "folder", {"quantize": "int4"}),
        )
    else:
        rows = (
            ("bf16", "BF16", {"dtype": "bfloat16"}),
            ("int8", "Q8_0", {}),
            ("int4", "Q4_0", {}),
        )
    return [
        Variant(engine="shoal", precision=precision, weights=file, options=options, growth=True)
        for precision, file, options in rows
    ]


def chosen(variants: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """By engine ("llama") or by name ("llama-q4_0").

    Raises:
        ValueError: a name that is neither.
    """
    found: list[Variant] = []
    for name in only:
        matching = [each for each in variants if each.engine == name and each.default]
        matching += [each for each in variants if each.name.replace(" ", "-") == name]
        if not matching:
            names = sorted({each.engine for each in variants})
            names += [each.name.replace(" ", "-") for each in variants]
            raise ValueError(f"--only has {name!r}; it may have: {', '.join(names)}")
        found += [each for each in matching if each not in found]
    return found


def has_bf16_instructions() -> bool:
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in cpu or "amx_bf16" in cpu


def kv_options(model: Path, options: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """shoal's KV cache, in bytes, for as many tokens as the others get."""
    # Loads torch, which only a run with shoal in it needs.
    import torch

    from shoal.core.options import EngineOptions
    from shoal.core.split import whole
    from shoal.worker.compute import choose_compute
    from shoal.worker.kv_pool import token_bytes

    spec = read_spec(model)
    choices = EngineOptions(model_path=str(model), num_threads=job["num_threads"], **options)
    kv_dtype = choose_compute(choices, spec, torch.device("cpu")).kv_dtype
    room = {
        "max_model_len": job["max_len"],
        "kv_cache_memory_bytes": job["kv_tokens"] * token_bytes(spec, whole(spec), kv_dtype),
    }
    return {**room, **options}


class ModelFiles:
    """The same weights as each engine wants them, made once and kept by content."""

    def __init__(self, model: str, folder: Path, environments: Path) -> None:
        resolved = resolve(model)
        self.source = resolved.path
        self._environments = environments
        name = hashlib.sha256(resolved.fingerprint.encode()).hexdigest()[:12]
        self._folder = folder / name

    def path(self, weights: str) -> Path:
        """Of the weights a variant names, made if need be.

        Raises:
            RuntimeError, OSError: it cannot be made; says why.
        """
        if self.source.is_dir():
            if weights != "folder":
                raise RuntimeError("reads GGUF files only; name a .gguf file as --model")
            return self.source
        target = self._folder / (weights if weights == "folder" else f"{weights}.gguf")
        if not target.exists():
            # Under another name until it is whole.
            unfinished = target.with_name(f"unfinished-{target.name}")
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            _run(self._command(weights, unfinished))
            unfinished.rename(target)
        return target

    def _command(self, weights: str, target: Path) -> list[str]:
        if weights == "folder":
            python = make_environment("transformers", self._environments)
            script = str(HERE / "peer_workers" / "hf_folder.py")
            return [str(python), script, str(self.source), str(target)]
        script = str(HERE / "requantize.py")
        return [sys.executable, script, str(self.source), str(target), "--type", weights]

    def weight_bytes(self, variant: Variant) -> float:
        """Bytes of weights that a token reads: all matrices; of an embedding that is not the
        output head too, next to nothing."""
        path = self.path(variant.weights)
        if path.is_dir():
            return _num_weights(path) * BITS[variant.precision] / 8
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
        untied = "output.weight" in sizes
        return sum(sizes.values()) - (sizes["token_embd.weight"] if untied else 0)


def _num_weights(folder: Path) -> int:
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    untied = any(name.endswith("lm_head.weight") for name in shapes)
    return sum(
        shape[0] * shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and not (untied and name.endswith("embed_tokens.weight"))
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise RuntimeError(f"{Path(command[1]).name} failed: {lines[-1][:300]}")
