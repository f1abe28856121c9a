"""A decoder's mixtures of experts: which experts a token goes through, and what those here add.

    x ── router ── ids, weights ── this rank's experts, their share of the tokens ── a part of a sum
                        └── ranks with experts only, where there are some (`expert_exchange.py`)

    T tokens   E hidden size   X experts of a layer   K that a token goes through

Every rank with hidden states chooses for all tokens, and finds the same: so nothing is asked,
unless they compute differently (`expert_choice.py`). Knows nothing of files, nor of who deals
experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.model_spec import ModelSpec
from shoal.core.split import PHASE_STEP, WHOLE_SHARE, Dealing, Shard
from shoal.kernels import ExpertWeights, KernelSet, RaggedBatch
from shoal.kernels.experts import slots
from shoal.model.expert_choice import ExpertChoice
from shoal.model.expert_exchange import ExpertExchange
from shoal.model.parameters import ExpertParameters


class Mixtures:
    """The mixtures of a shard's layers.

    Args:
        group: whose `all_to_all` reaches all ranks of the instance; None: there is one.

    Attributes:
        counts: int64 [layers of the shard, X], tokens that each expert was chosen for so far.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        kernels: KernelSet,
        device: torch.device,
        dtype: torch.dtype,
        group: Group | None,
    ) -> None:
        assert spec.experts is not None, "a model without experts has no mixtures"
        self._spec, self._experts, self._shard = spec, spec.experts, shard
        self._kernels, self._dtype = kernels, dtype
        self.counts = torch.zeros(
            len(shard.layers), spec.experts.num_experts, dtype=torch.int64, device=device
        )
        self._choice = ExpertChoice(group if shard.has_stream else None)
        self._exchange: ExpertExchange | None = None
        if shard.exchanges:
            assert group is not None, "an exchange is among ranks"
            self._exchange = ExpertExchange(group, shard, spec.experts, device)

    def run(
        self, layer: int, x_TE: Tensor, experts: ExpertParameters, batch: RaggedBatch
    ) -> Tensor:
        """What this rank adds to each token, [T, E]."""
        rules = self._experts
        ids_TK, weights_TK = self._kernels.route(
            x_TE,
            experts.router_XE,
            num_active=rules.num_active,
            renormalises=rules.renormalises,
            scale=rules.scale,
            num_groups=rules.num_groups,
            num_active_groups=rules.num_active_groups,
        )
        ids_TK, weights_TK = self._choice.settle(ids_TK, weights_TK)
        self._count(layer, ids_TK, batch)
        phase = (batch.positions_T[0] + layer) * PHASE_STEP % WHOLE_SHARE  # `share_phase`
        if self._exchange is None:
            return self._run_own(x_TE, ids_TK, weights_TK, experts.stack, phase)
        sent = self._exchange.send(layer, x_TE, ids_TK, weights_TK, phase)
        out_TE = self._run_own(x_TE, ids_TK, weights_TK, experts.stack, phase)
        return self._exchange.add_returned(sent, out_TE)

    def serve(self, experts: ExpertParameters) -> None:
        """A layer of a rank with experts only: what it is sent is all for it."""
        assert self._exchange is not None, "only ranks with hidden states run without others"
        stack, num_experts = experts.stack, self._experts.num_experts
        if stack is not None:
            places = [(each.expert, 0, WHOLE_SHARE) for each in experts.shares]
            slots_X3 = slots(num_experts, places).to(stack.slots_X3.device)
            stack = replace(stack, slots_X3=slots_X3)

        def run(x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
            x_NE = x_NE.to(self._dtype)
            phase = ids_NK.new_zeros(())
            return self._run_own(x_NE, ids_NK, weights_NK, stack, phase)

        self._exchange.serve(self._spec.hidden_size, run)

    def compare(self, arithmetic: str) -> None:
        """As `Decoder.compare`."""
        self._choice.compare(arithmetic, self.counts.device)

    def deal(self, layer: int, dealing: Dealing) -> None:
        """From the next Step on a layer's experts are dealt so."""
        if self._exchange is not None:
            self._exchange.deal(layer, dealing)

    def _run_own(
        self,
        x_TE: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        stack: ExpertWeights | None,
        phase: Tensor,
    ) -> Tensor:
        if stack is None:
            return torch.zeros_like(x_TE)
        run = self._kernels.experts
        return run(x_TE, ids_TK, weights_TK, stack, phase, self._spec.activation)

    def _count(self, layer: int, ids_TK: Tensor, batch: RaggedBatch) -> None:
        ones_TK = torch.ones_like(ids_TK)
        if batch.context_lens_R is not None:  # rows of padding
            ones_TK *= (batch.context_lens_R > 0).unsqueeze(-1)
        counts_X = self.counts[layer - self._shard.layers.start]
        counts_X.index_add_(0, ids_TK.flatten(), ones_TK.flatten())
