"""A device of a few rates, so that a Step's seconds can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.policy.cost_model.loads import StepLoad, Windows
from shoal.sim.instance_seconds import decode_loads


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """The same on every hop.

    Attributes:
        step_s: whatever is in a Step.
        weights_s: of reading the weights once; a Step that computes for longer hides it.
        token_s: of a token's products.
        context_s: of reading a token's KV.
        pair_s: of a pair of tokens in attention.
        hop_s: from one instance to the next.
    """

    step_s: float
    weights_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0
    pair_s: float = 0.0
    hop_s: float = 0.0
    windows: Windows = (None,)
    error: float = 0.0

    def compute_s(self, load: StepLoad, route: int, hop: int) -> float:
        del route, hop
        products_s = self.token_s * load.num_tokens + self.pair_s * load.pairs[0]
        reading_s = self.context_s * load.kv_tokens[0]
        return self.step_s + max(self.weights_s, products_s) + reading_s

    def decodes_s(self, lengths: Sequence[int], count: int, route: int, hop: int) -> list[float]:
        loads = decode_loads(lengths, count, self.windows)
        return [self.compute_s(load, route, hop) for load in loads]

    def transfer_s(self, num_tokens: int, route: int, hop: int) -> float:
        del num_tokens, route, hop
        return self.hop_s
