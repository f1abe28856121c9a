"""Weights in few bits: what the codes mean, and how to make and undo them. Plain torch.

    F rows   K columns   G groups of K / G columns, the same in every row

    value[f, k] = scale[f, g] * code[f, k] + minimum[f, g]     g = k // (K / G)

Formats:
    int8  codes int8 [F, K]; no minimums
    int4  codes uint8 [F, K / 2], two to a byte, the even column in the low four bits; without
          minimums the code 8 means zero (minimum = -8 * scale)
    fp8   codes float8_e4m3fn [F, K]; no minimums

Knows nothing of files or of who multiplies with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WeightFormat = Literal["int8", "int4", "fp8"]

GROUP_SIZE = 32
"""Columns that share a scale when we quantise: as in GGUF's Q4_0 and Q8_0."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [F, K] in one of the formats above.

    Attributes:
        scales_FG: floating point.
        minimums_FG: floating point, int4 only; None: symmetric.
    """

    format: WeightFormat
    codes: Tensor
    scales_FG: Tensor
    minimums_FG: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.codes.shape
        return rows, width * 2 if self.format == "int4" else width

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales_FG.shape[1]

    @property
    def nbytes(self) -> int:
        minimums = 0 if self.minimums_FG is None else self.minimums_FG.nbytes
        return self.codes.nbytes + self.scales_FG.nbytes + minimums

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [F, K], computed in fp32."""
        rows, columns = self.shape
        if self.format == "int4":
            low_high = torch.stack((self.codes & 15, self.codes >> 4), -1)
            values = low_high.view(rows, columns).float()
            if self.minimums_FG is None:
                values -= 8
        else:
            values = self.codes.float()
        grouped_FGS = values.view(rows, -1, self.group_size)
        grouped_FGS.mul_(self.scales_FG.float()[..., None])
        if self.minimums_FG is not None:
            grouped_FGS.add_(self.minimums_FG.float()[..., None])
        return values.to(dtype)


def pack_int4(codes_FK: Tensor) -> Tensor:
    """uint8 codes below 16, one to a byte, as int4 keeps them: two to a byte."""
    return codes_FK[:, ::2] | (codes_FK[:, 1::2] << 4)


def quantize(
    weight_FK: Tensor,
    format: WeightFormat,  # noqa: A002 - the attribute it becomes
    group_size: int = GROUP_SIZE,
) -> QuantizedWeight:
    """The weight in `format`, each value to a near code; works on a few rows at a time.

    int8: scale = max|x| / 127 of a group (GGUF's Q8_0), fp16. int4: no minimums, as GGUF's Q4_0:
    the value largest in size becomes about -8; of a few scales around that, the one that leaves
    the least squared error, fp16. fp8: scale = max|x| / 448 of a row, fp32, whatever the group
    size. Zeros stay zeros.

    Raises:
        ValueError: no matrix, columns that are no whole groups, values that are not finite.
    """
    if weight_FK.dim() != 2 or 0 in weight_FK.shape:
        raise ValueError(f"the weight has shape {list(weight_FK.shape)}; needed [rows, columns]")
    rows, columns = weight_FK.shape
    if format == "fp8":
        group_size = columns
    if group_size < 1 or columns % group_size or (format == "int4" and group_size % 2):
        raise ValueError(
            f"{columns} columns are no whole {format} groups of {group_size}; choose a group size "
            "that divides them (an even one for int4), or leave this weight as it is"
        )
    width, dtype, scale_dtype = _STORED[format]
    device = weight_FK.device
    codes = torch.empty(rows, columns // width, dtype=dtype, device=device)
    scales_FG = torch.empty(rows, columns // group_size, dtype=scale_dtype, device=device)
    step = max(1, _CHUNK_VALUES // columns)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        # Groups side by side, [group size, groups]: then everything below is long vectors.
        values_SN = weight_FK[chunk].float().reshape(-1, group_size).t().contiguous()
        codes_SN, scales_N = _QUANTIZE[format](values_SN)
        codes_FK = codes_SN.t().reshape(-1, columns)
        codes[chunk] = pack_int4(codes_FK) if format == "int4" else codes_FK
        scales_FG[chunk] = scales_N.view(-1, columns // group_size)
    return QuantizedWeight(format, codes, scales_FG)


def quantize_with_minimums(weight_FK: Tensor) -> QuantizedWeight:
    """The weight in int4 with minimums, as GGUF's Q4_1: 16 even steps from least to largest.

    Raises:
        ValueError: columns that are no whole groups of 32, values that are not finite.
    """
    rows, columns = weight_FK.shape
    if columns % GROUP_SIZE:
        raise ValueError(f"{columns} columns are no whole groups of {GROUP_SIZE}")
    values_FGS = weight_FK.float().view(rows, -1, GROUP_SIZE)
    _largest(values_FGS.flatten(0, 1).t())
    minimums_FG = values_FGS.amin(-1).clamp_(-_FP16_MAX, _FP16_MAX).half()
    scales_FG = ((values_FGS.amax(-1) - values_FGS.amin(-1)) / 15).clamp_(max=_FP16_MAX).half()
    steps_FGS = (values_FGS - minimums_FG.float()[..., None]) * _inverse(scales_FG.float())[
        ..., None
    ]
    codes_FK = steps_FGS.round_().clamp_(0, 15).to(torch.uint8).view(rows, columns)
    return QuantizedWeight("int4", pack_int4(codes_FK), scales_FG, minimums_FG)


_STORED = {
    "int8": (1, torch.int8, torch.float16),
    "int4": (2, torch.uint8, torch.float16),
    "fp8": (1, torch.float8_e4m3fn, torch.float32),
}
"""Columns to a code, type of codes, type of scales."""
_CHUNK_VALUES = 2**17  # what is at work fits the level 2 cache
_FP8_MAX = 448.0
_FP16_MAX = 65504.0
_TINY = 1e-30  # groups below it are zeros: one over their scale would be too large for fp32
_INT4_STEPS = (0.85, 0.9, 0.95, 1.05, 1.1, 1.2)
"""Scales tried, over max|x| / 8: more of them gain less than 0.4 % of the squared error."""


def _int8(values_SN: Tensor) -> tuple[Tensor, Tensor]:
    scales_N = (_largest(values_SN) / 127).clamp_(max=_FP16_MAX).half()
    codes_SN = (values_SN * _inverse(scales_N.float())).round_().clamp_(-127, 127)
    return codes_SN.to(torch.int8), scales_N


def _fp8(values_SN: Tensor) -> tuple[Tensor, Tensor]:
    scales_N = _largest(values_SN) / _FP8_MAX
    codes_SN = (values_SN * _inverse(scales_N)).clamp_(-_FP8_MAX, _FP8_MAX)
    return codes_SN.to(torch.float8_e4m3fn), scales_N


def _int4(values_SN: Tensor) -> tuple[Tensor, Tensor]:
    _largest(values_SN)
    lowest_N, highest_N = values_SN.amin(0), values_SN.amax(0)
    extreme_N = torch.where(-lowest_N >= highest_N, lowest_N, highest_N)
    # Over their extreme: then no sum of squares overflows, and a scale to try is one number.
    share_SN = values_SN / torch.where(extreme_N.abs() > _TINY, extreme_N, torch.inf)
    codes_SN, product_SN = torch.empty_like(share_SN), torch.empty_like(share_SN)

    def fit(inverse: Tensor | float) -> tuple[Tensor, Tensor]:
        """The best scale for the codes that this one gives, and how much of x² it explains."""
        torch.mul(share_SN, inverse, out=codes_SN).round_().clamp_(-8, 7)
        dot_N = torch.mul(share_SN, codes_SN, out=product_SN).sum(0)
        square_N = torch.mul(codes_SN, codes_SN, out=product_SN).sum(0).clamp_(min=1)
        scales_N = dot_N / square_N
        return scales_N, dot_N * scales_N

    best_N, explained_N = torch.full_like(extreme_N, -8.0), fit(-8.0)[1]
    for step in _INT4_STEPS:
        more_N = fit(-8.0 * step)[1]
        best_N.masked_fill_(more_N > explained_N, -8.0 * step)
        explained_N = torch.maximum(explained_N, more_N)
    scales_N = fit(best_N)[0] * extreme_N
    return codes_SN.add_(8).to(torch.uint8), scales_N.clamp_(-_FP16_MAX, _FP16_MAX).half()


def _largest(values_SN: Tensor) -> Tensor:
    largest_N = values_SN.abs().amax(0)
    if not bool(largest_N.isfinite().all()):
        raise ValueError("the weight holds inf or nan; quantise a checkpoint that is whole")
    return largest_N


def _inverse(scales_N: Tensor) -> Tensor:
    return torch.where(scales_N.abs() > _TINY, 1 / scales_N, 0.0)


_QUANTIZE = {"int8": _int8, "int4": _int4, "fp8": _fp8}
