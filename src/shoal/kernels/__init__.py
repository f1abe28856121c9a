"""Kernel sets, chosen explicitly by name; `reference` (plain torch) is the definition.

A missing or unknown set is an error, never a silent fallback. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

import torch

from shoal.kernels.batch import HeldBlocks, KVCache, LayerKV, RaggedBatch
from shoal.kernels.experts import Experts, ExpertWeights, Route
from shoal.kernels.quantized import QuantizedWeight

__all__ = [
    "ExpertWeights",
    "HeldBlocks",
    "KVCache",
    "KernelSet",
    "LayerKV",
    "QuantizedWeight",
    "RaggedBatch",
    "select",
]


class Attention(Protocol):
    def __call__(
        self,
        q_THD: torch.Tensor,
        kv: LayerKV,
        batch: RaggedBatch,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...


class PartialAttention(Protocol):
    def __call__(
        self,
        q_THD: torch.Tensor,
        kv: LayerKV,
        batch: RaggedBatch,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class RopeAndStore(Protocol):
    def __call__(
        self,
        qkv_TC: torch.Tensor,
        qk_norm_HD: torch.Tensor | None,
        eps: float,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
        kv: LayerKV,
        batch: RaggedBatch,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """The operations a decoder is built from; `reference.py` documents and defines each
    (`experts.py`: route and experts).

    Several in one, where a set has them (None: the decoder does one after the other):

    Attributes:
        add_rms_norm: (x, y, weight, eps) → x + y, and its norm.
        rope_and_store: norms the heads of q and k (unless None), rotates them, stores keys and
            values; returns q_THD.

    `partial_attention`: over some blocks of each row (`HeldBlocks`); None: the set cannot.

    `reads_lengths_on_device`: attention may be held in a CUDA graph: it knows
    `RaggedBatch.context_lens_R`, and slot -1 stores nothing.
    """

    name: str
    linear: Callable[
        [torch.Tensor, torch.Tensor | QuantizedWeight, torch.Tensor | None], torch.Tensor
    ]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    rope_angles: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    store_kv: Callable[[torch.Tensor, torch.Tensor, LayerKV, RaggedBatch], None]
    attention: Attention
    gated_activation: Callable[[torch.Tensor, Literal["silu", "gelu_tanh"]], torch.Tensor]
    route: Route
    experts: Experts
    add_rms_norm: (
        Callable[
            [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
        ]
        | None
    ) = None
    rope_and_store: RopeAndStore | None = None
    partial_attention: PartialAttention | None = None
    reads_lengths_on_device: bool = False


def select(name: str) -> KernelSet:
    """The kernel set of that name.

    Raises:
        ValueError: there is none.
        ImportError: a package it needs is not installed.
    """
    if name not in _MODULES:
        raise ValueError(f"kernel set {name!r} does not exist; choose one of {sorted(_MODULES)}")
    kernel_set = import_module(_MODULES[name]).KERNELS
    assert isinstance(kernel_set, KernelSet)
    return kernel_set


_MODULES = {"cuda": "shoal.kernels.cuda", "reference": "shoal.kernels.reference"}
