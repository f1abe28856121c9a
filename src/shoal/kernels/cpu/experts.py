"""Experts of a layer, as the compiled library wants them.

    E hidden size   X experts of the layer   F columns of an expert

Knows nothing of checkpoints, nor of who has the other experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shoal.kernels.cpu import library as c
from shoal.kernels.cpu.arena import PackedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRules:
    """How experts are chosen, and their shape: those of all layers are alike.

    Attributes:
        num_active: of a token.
        num_groups, num_active_groups: of consecutive experts, and those that are chosen from.
        ffn_size: of each expert.
    """

    num_experts: int
    num_active: int
    num_groups: int
    num_active_groups: int
    renormalises: bool
    scale: float
    ffn_size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedExperts:
    """Experts of a layer that a rank has; they are run in the order of `shares`.

    Attributes:
        layer: of the model.
        shares: (expert, start, stop), as `kernels/experts.py` says; an expert has one.
        router_XE, shared_gate_E: fp32.
        gate_up, down: of each share.
        counts_X: int64, what is chosen is added to it.
    """

    layer: int
    shares: Sequence[tuple[int, int, int]]
    router_XE: Tensor
    shared_gate_E: Tensor | None
    gate_up: Sequence[PackedWeight]
    down: Sequence[PackedWeight]
    counts_X: Tensor


class CompiledExperts:
    """`PackedExperts` in the library's structs; keeps them alive."""

    def __init__(self, packed: PackedExperts) -> None:
        num_shares, numbers = len(packed.shares), {expert for expert, _, _ in packed.shares}
        assert len(numbers) == num_shares, "a rank has one share of an expert"
        assert all(0 <= each < len(packed.router_XE) for each in numbers), "of those that there are"
        for tensor in (packed.router_XE, packed.counts_X):
            assert tensor.is_contiguous(), "rows lie one after another"
        pairs = zip(packed.gate_up, packed.down, strict=True)
        weights = [weight.as_c() for pair in pairs for weight in pair]
        gate = packed.shared_gate_E
        self._packed = packed
        self.struct = c.Experts(
            router=packed.router_XE.data_ptr(),
            shared_gate=None if gate is None else gate.data_ptr(),
            weights=(c.Weight * len(weights))(*weights),
            shares=(c.Share * num_shares)(*(c.Share(*each) for each in packed.shares)),
            counts=packed.counts_X.data_ptr(),
            num_shares=num_shares,
            layer=packed.layer,
        )
