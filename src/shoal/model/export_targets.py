"""What becomes of each tensor of a checkpoint that is quantised, and how config.json says it.

    int4, int8   pack-quantized: <module>.weight_packed, .weight_scale (fp16), .weight_shape
    fp8          float-quantized: <module>.weight, .weight_scale (fp32, one a row)

The layout is in `compressed_tensors.py`. Knows nothing of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.kernels.quantized import WeightFormat
from shoal.model.exports import Export
from shoal.model.safetensors_writer import TensorPlan


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor and what becomes of it; a format of None: 16 bits, or as it is."""

    export: Export
    format: WeightFormat | None
    group_size: int

    @property
    def module(self) -> str:
        return self.export.name.removesuffix(".weight")

    @property
    def num_values(self) -> int:
        return torch.Size(self.export.shape).numel()

    def plans(self) -> list[TensorPlan]:
        shape = self.export.shape
        if self.format is None:
            return [TensorPlan(self.export.name, _plain_dtype(self.export), shape)]
        rows, columns = shape
        if self.format == "fp8":
            return [
                TensorPlan(f"{self.module}.weight", torch.float8_e4m3fn, (rows, columns)),
                TensorPlan(f"{self.module}.weight_scale", torch.float32, (rows, 1)),
            ]
        words = columns * _BITS[self.format] // 32
        groups = columns // self.group_size
        return [
            TensorPlan(f"{self.module}.weight_packed", torch.int32, (rows, words)),
            TensorPlan(f"{self.module}.weight_scale", torch.float16, (rows, groups)),
            TensorPlan(f"{self.module}.weight_shape", torch.int64, (2,)),
        ]


def choose_targets(
    exports: Sequence[Export],
    weight_format: WeightFormat,
    group_size: int,
    *,
    include_head: bool,
) -> list[Target]:
    """What becomes of each tensor: embedding and head are no less than int8, if quantised at all.

    A projection whose columns are no whole groups stays plain.
    """

    def target(export: Export) -> Target:
        wanted: WeightFormat | None = None
        if export.role == "projection":
            wanted = weight_format
        elif export.role == "table" and include_head:
            wanted = "int8" if weight_format == "int4" else weight_format
        if wanted is None or not _fits(export.shape, wanted, group_size):
            return Target(export, None, 0)
        return Target(export, wanted, export.shape[1] if wanted == "fp8" else group_size)

    return [target(export) for export in exports]


def quantization_config(targets: Sequence[Target]) -> dict[str, Any]:
    """What config.json says of what `write_compressed` wrote."""
    groups = {}
    by_role: dict[tuple[WeightFormat, int], set[str]] = {}
    for target in targets:
        if target.format is not None:
            size = 0 if target.format == "fp8" else target.group_size
            is_table = target.export.role == "table"
            name = f"re:.*{target.module.rpartition('.')[2]}$" if is_table else "Linear"
            by_role.setdefault((target.format, size), set()).add(name)
    for index, ((weight_format, size), names) in enumerate(by_role.items()):
        groups[f"group_{index}"] = {
            "targets": sorted(names),
            "weights": _weights_config(weight_format, size),
            "input_activations": None,
            "output_activations": None,
        }
    plain = [
        target.module
        for target in targets
        if target.format is None
        and len(target.export.shape) == 2
        and target.export.name.endswith(".weight")
        and "embed" not in target.module
    ]
    has_head = any(target.module.endswith("lm_head") for target in targets)
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if ("fp8", 0) in by_role else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain if has_head else [*plain, "lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_BITS = {"int4": 4, "int8": 8}


def _weights_config(weight_format: WeightFormat, group_size: int) -> dict[str, Any]:
    is_float = weight_format == "fp8"
    return {
        "num_bits": 8 if is_float else _BITS[weight_format],
        "type": "float" if is_float else "int",
        "symmetric": True,
        "strategy": "channel" if is_float else "group",
        "group_size": None if is_float else group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _fits(shape: tuple[int, ...], weight_format: WeightFormat, group_size: int) -> bool:
    if len(shape) != 2:
        return False
    # Words of 32 bits must be whole too, and no byte belong to two groups.
    in_bytes = weight_format == "int8" or group_size % 2 == 0
    in_words = in_bytes and shape[1] % group_size == 0 and shape[1] % 8 == 0
    return weight_format == "fp8" or in_words


def _plain_dtype(export: Export) -> torch.dtype:
    """Matrices of 32 bits are kept in 16, norms and biases as they are."""
    dtype = export.dtype
    if dtype == torch.float64 or (dtype == torch.float32 and len(export.shape) < 2):
        return torch.float32
    return torch.bfloat16 if dtype == torch.float32 else dtype
