"""What a compiled decoder's mixtures of experts do together with other ranks.

    choice, in C ─► one for all, if ranks differ ─► tokens to ranks with experts only ─►
                      own experts, in C ─► plus what those ranks gave back

    T tokens   E hidden size   K experts of a token   N rows

Knows nothing of how experts are computed, nor of who deals them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Dealing, Shard
from shoal.kernels.cpu.exchange import PythonExchange
from shoal.model.expert_choice import ExpertChoice
from shoal.model.expert_exchange import ExpertExchange, RunExperts

_CPU = torch.device("cpu")


class PackedMixture:
    """The mixtures of a shard's layers.

    Args:
        group: whose `all_to_all` reaches all ranks of the instance; None: there is one.
    """

    def __init__(self, spec: ModelSpec, shard: Shard, group: Group | None) -> None:
        assert spec.experts is not None, "a model without experts has no mixtures"
        self._hidden_size = spec.hidden_size
        self._has_stream = shard.has_stream
        self._choice = ExpertChoice(group if shard.has_stream else None)
        self._exchange: ExpertExchange | None = None
        if shard.exchanges:
            assert group is not None, "an exchange is among ranks"
            self._exchange = ExpertExchange(group, shard, spec.experts, _CPU)
        self._sent: list[Tensor] = []
        self._calls = PythonExchange(
            self._routed,
            self._returned,
            hidden_size=spec.hidden_size,
            num_active=spec.experts.num_active,
        )

    @property
    def addresses(self) -> tuple[int | None, int | None]:
        """What the library has to call before the products of experts, and after them."""
        routed, returned = self._calls.addresses
        if self._exchange is not None:
            return routed, returned
        return routed if self._choice.is_shared else None, None

    def compare(self, arithmetic: str) -> None:
        """As `Decoder.compare`; `addresses` may be others then."""
        self._choice.compare(arithmetic, _CPU)

    def deal(self, layer: int, dealing: Dealing) -> None:
        """From the next Step on a layer's experts are dealt so."""
        if self._exchange is not None:
            self._exchange.deal(layer, dealing)

    def serve(self, run: RunExperts) -> None:
        """A layer of a rank with experts only: what it is sent is all for it."""
        assert self._exchange is not None, "only ranks with hidden states run without others"
        self._exchange.serve(self._hidden_size, run)

    def take_error(self) -> BaseException | None:
        """What made the last call of the library fail."""
        return self._calls.take_error()

    def _routed(
        self, layer: int, x_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, phase: int
    ) -> None:
        if self._choice.is_shared:
            chosen_TK, theirs_TK = self._choice.settle(ids_TK, weights_TK)
            ids_TK.copy_(chosen_TK)
            weights_TK.copy_(theirs_TK)
        if self._exchange is not None:
            self._sent = self._exchange.send(layer, x_TE, ids_TK, weights_TK, phase)

    def _returned(self, out_TE: Tensor) -> None:
        assert self._exchange is not None, "nothing went to other ranks"
        self._exchange.add_returned(self._sent, out_TE)
