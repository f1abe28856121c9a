"""Writes tiny checkpoints as other quantisers do, in plain code of its own.

A `Writer` takes a module's name and its weight [F, K] and gives the tensors that the family keeps
for it, and the weight that they stand for. Nothing here is shared with the loader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import reference_model
from safetensors.torch import save_file
from torch import Tensor

Writer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def write_quantized(
    plain: Path, folder: Path, writer: Writer, config: dict[str, Any], ignore: tuple[str, ...] = ()
) -> Any:
    """Quantises every projection of the checkpoint `plain` into `folder`.

    Args:
        ignore: fragments of the names of modules that stay plain.

    Returns:
        transformers' model with the weights that `folder` stands for.
    """
    folder.mkdir()
    model = reference_model(plain)
    tensors: dict[str, Tensor] = {}
    for name, parameter in _unstacked(model):
        module = name.removesuffix(".weight")
        if "_proj.weight" not in name or any(fragment in name for fragment in ignore):
            tensors[name] = parameter.detach().clone()
            continue
        stored, values = writer(module, parameter.detach())
        tensors.update({f"{module}.{part}": tensor for part, tensor in stored.items()})
        with torch.no_grad():
            parameter.copy_(values)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
    read = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, "quantization_config": config}))
    return model


def _unstacked(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, with each expert's by itself, as these families keep them."""
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            yield name, parameter
            continue
        base, _, part = name.rpartition(".")
        fused = {"gate_up_proj": ("gate_proj", "up_proj")}.get(part, (part,))
        for number, weight in enumerate(parameter.detach()):
            for each, rows in zip(fused, weight.chunk(len(fused)), strict=True):
                yield f"{base}.{number}.{each}.weight", rows


FILE = "model.safetensors"


def grid(
    weight: Tensor, bits: int, groups: list[int], symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """Codes [F, K] from 0, zeros and fp16 scales [F, G], and the values; by groups of columns."""
    values = weight.double().numpy()
    rows, columns = values.shape
    num_groups, top = max(groups) + 1, 2**bits - 1
    codes = np.zeros((rows, columns), np.int64)
    zeros = np.zeros((rows, num_groups), np.int64)
    scales = np.zeros((rows, num_groups), np.float16)
    exact = np.zeros((rows, columns))
    for group in range(num_groups):
        members = [column for column in range(columns) if groups[column] == group]
        part = values[:, members]
        if symmetric:
            scale = np.abs(part).max(1) / (top / 2)
            zero = np.full(rows, 2 ** (bits - 1))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.clip(np.round(-low / scale), 1, top)
        scales[:, group] = scale
        zeros[:, group] = zero
        used = scales[:, group].astype(np.float64)[:, None]
        code = np.clip(np.round(part / used) + zero[:, None], 0, top)
        codes[:, members] = code
        exact[:, members] = (code - zero[:, None]) * used
    return codes, zeros, scales, torch.from_numpy(exact).float()


def words(codes: np.ndarray, bits: int, order: list[int] | None = None) -> Tensor:
    """Neighbours along the last dimension in words of 32 bits, the first lowest; padded with 0."""
    per_word = 32 // bits
    padding = -codes.shape[-1] % per_word
    codes = np.pad(codes, [(0, 0), (0, padding)]).reshape(codes.shape[0], -1, per_word)
    packed = np.zeros(codes.shape[:2], np.int64)
    for place in range(per_word):
        packed |= codes[:, :, place if order is None else order[place]] << (bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def in_order(columns: int, group_size: int) -> list[int]:
    return [column // group_size for column in range(columns)]


def awq(group_size: int) -> Writer:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        codes, zeros, scales, values = grid(weight, 4, in_order(weight.shape[1], size), False)
        stored = {
            "qweight": words(codes.T, 4, order),
            "qzeros": words(zeros.T, 4, order),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        return stored, values

    return write


def gptq(
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    v2: bool = False,
    permuted: bool = False,
    with_g_idx: bool = True,
) -> Writer:
    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        groups = in_order(columns, group_size)
        if permuted:
            places = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
            groups = [groups[place] for place in places.tolist()]
        codes, zeros, scales, values = grid(weight, bits, groups, symmetric)
        stored = {
            "qweight": words(codes, bits).t(),
            "qzeros": words(zeros.T - (0 if v2 else 1), bits),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        if with_g_idx:
            stored["g_idx"] = torch.tensor(groups, dtype=torch.int32)
        return stored, values

    return write


def packed(bits: int, group_size: int, *, symmetric: bool = True, permuted: bool = False) -> Writer:
    """compressed-tensors' pack-quantized; a group size of -1: one scale a row."""

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        groups = in_order(columns, columns if group_size == -1 else group_size)
        if permuted:
            groups = groups[::-1]
        codes, zeros, scales, values = grid(weight, bits, groups, symmetric)
        stored = {
            "weight_packed": words(codes, bits),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            stored["weight_zero_point"] = words(zeros.T, bits).t()
        if permuted:
            stored["weight_g_idx"] = torch.tensor(groups, dtype=torch.int32)
        return stored, values

    return write


def int_quantized(group_size: int, *, symmetric: bool = True) -> Writer:
    """compressed-tensors' int-quantized: int8 codes, and int8 zero points beside the scales."""

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        groups = in_order(columns, columns if group_size == -1 else group_size)
        codes, zeros, scales, values = grid(weight, 8, groups, symmetric)
        stored = {
            "weight": torch.from_numpy((codes - 128).astype(np.int8)),
            "weight_scale": torch.from_numpy(scales),
        }
        if not symmetric:
            stored["weight_zero_point"] = torch.from_numpy((zeros - 128).astype(np.int8))
        return stored, values

    return write


def fp8(block: tuple[int, int] | None, scale_name: str, *, dims: int = 2) -> Writer:
    """FP8 with one scale a block, of any dtype; None: one for the weight, with `dims` dimensions.

    A block may be larger than the weight: (1, 10**6) is one scale a row.
    """

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        block_rows, block_columns = (10**6, 10**6) if block is None else block
        values, codes = weight.clone(), torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(-(-rows // block_rows), -(-columns // block_columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                row = slice(i * block_rows, (i + 1) * block_rows)
                column = slice(j * block_columns, (j + 1) * block_columns)
                scales[i, j] = weight[row, column].abs().max() / 448
                codes[row, column] = (weight[row, column] / scales[i, j]).to(codes.dtype)
                values[row, column] = codes[row, column].float() * scales[i, j]
        stored = scales.reshape([1] * dims) if block is None else scales
        return {
            "weight": codes,
            scale_name: stored,
            "input_scale": torch.ones(1),
        }, values

    return write
