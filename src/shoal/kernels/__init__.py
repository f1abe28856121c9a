"""Kernel sets, chosen explicitly by name; `reference` (plain torch) is the definition.

A missing or unknown set is an error, never a silent fallback. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

import torch

from shoal.kernels.batch import KVCache, RaggedBatch

__all__ = ["KVCache", "KernelSet", "RaggedBatch", "select"]


class Attention(Protocol):
    def __call__(
        self,
        q_THD: torch.Tensor,
        k_NBHD: torch.Tensor,
        v_NBHD: torch.Tensor,
        batch: RaggedBatch,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """The operations a decoder is built from; `reference.py` documents and defines each."""

    name: str
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    rope_angles: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    store_kv: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, RaggedBatch], None]
    attention: Attention
    gated_activation: Callable[[torch.Tensor, Literal["silu", "gelu_tanh"]], torch.Tensor]


def select(name: str) -> KernelSet:
    """The kernel set of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _MODULES:
        raise ValueError(f"kernel set {name!r} does not exist; choose one of {sorted(_MODULES)}")
    kernel_set = import_module(_MODULES[name]).KERNELS
    assert isinstance(kernel_set, KernelSet)
    return kernel_set


_MODULES = {"reference": "shoal.kernels.reference"}
