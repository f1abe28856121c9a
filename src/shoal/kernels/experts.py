"""Mixtures of experts: the weights they are run from, and what a kernel set does with them.

    T tokens   E hidden size   F columns of an expert
    X experts of the layer   K that a token goes through
    S experts held here, in the order of their numbers

An expert held here takes some of the tokens that are sent to it: of n, in the order of the batch,
those from (n * start + phase) >> 16 to (n * stop + phase) >> 16, all where start and stop are 0
and 1 << 16. Ranks that share an expert so draw the same line. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from shoal.kernels.quantized import QuantizedWeight

SHARE_BITS = 16
Stack = torch.Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """Experts of a layer that are held here, one below the other.

    Attributes:
        slots_X3: int32, of each expert of the layer: its place among those held (-1: it is not),
            and the start and stop of its share. On the device.
        gate_up_FE: [S * 2F, E]: of each expert gate's rows, then up's.
        down_EF: [S * E, F].
    """

    slots_X3: torch.Tensor
    gate_up_FE: Stack
    down_EF: Stack


class Route(Protocol):
    def __call__(
        self,
        x_TE: torch.Tensor,
        router_XE: torch.Tensor,
        *,
        num_active: int,
        renormalises: bool,
        scale: float,
        num_groups: int,
        num_active_groups: int,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Experts(Protocol):
    def __call__(
        self,
        x_TE: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        experts: ExpertWeights,
        phase: torch.Tensor,
        activation: Literal["silu", "gelu_tanh"],
    ) -> torch.Tensor: ...


def slots(num_experts: int, shares: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """`ExpertWeights.slots_X3` of (expert, start, stop) in the order that they are held."""
    slots_X3 = torch.zeros(num_experts, 3, dtype=torch.int32)
    slots_X3[:, 0] = -1
    for slot, (expert, start, stop) in enumerate(shares):
        slots_X3[expert] = torch.tensor((slot, start, stop), dtype=torch.int32)
    return slots_X3


def rows_of(stack: Stack, start: int, stop: int) -> Stack:
    """Rows of a stack, without a copy."""
    if isinstance(stack, torch.Tensor):
        return stack[start:stop]
    minimums_FG = None if stack.minimums_FG is None else stack.minimums_FG[start:stop]
    codes, scales_FG = stack.codes[start:stop], stack.scales_FG[start:stop]
    return QuantizedWeight(stack.format, codes, scales_FG, minimums_FG)


def num_rows(stack: Stack) -> int:
    return int(stack.shape[0])
