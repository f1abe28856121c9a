"""Who chooses experts: every rank for itself, or one for all where ranks compute differently.

    alike           every rank has the same hidden states, and chooses the same: nothing is asked
    CPU and GPU     scores may differ by rounding, and so the choice: ids and weights of the first
                    rank go to all, before the experts

    T tokens   K experts of a token

Knows nothing of how scores are made, or of who has which experts.
"""

from __future__ import annotations

import hashlib
import logging

import torch
from torch import Tensor

from shoal.comm import Group

_DIGEST_BYTES = 8
_log = logging.getLogger(__name__)


class ExpertChoice:
    """One rank's end.

    Args:
        group: the ranks with hidden states; None: there is one.

    Attributes:
        is_shared: the first rank's choice is taken.
    """

    def __init__(self, group: Group | None) -> None:
        self._group = group if group is not None and group.size > 1 else None
        self.is_shared = False

    def compare(self, arithmetic: str, device: torch.device) -> None:
        """Find out whether ranks choose alike; all come at once.

        Args:
            arithmetic: ranks that say the same make the same bits of the same numbers.
            device: where the group exchanges tensors.
        """
        if self._group is None:
            return
        digest = bytearray(hashlib.sha256(arithmetic.encode()).digest()[:_DIGEST_BYTES])
        said_RB = self._group.all_gather(torch.frombuffer(digest, dtype=torch.uint8).to(device))
        self.is_shared = bool((said_RB != said_RB[0]).any())
        if self.is_shared and self._group.rank == 0:
            _log.info("ranks compute differently: this one chooses the experts of all tokens")

    def settle(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and weights that all ranks go by, given this one's."""
        if self._group is None or not self.is_shared:
            return ids_TK, weights_TK
        # In one tensor: fp32 holds any expert's number.
        own_TK = torch.cat((ids_TK.float(), weights_TK), -1)
        ids, weights = self._group.all_gather(own_TK)[0].chunk(2, -1)
        return ids.long().contiguous(), weights.contiguous()
