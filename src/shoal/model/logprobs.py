"""Log-probabilities of tokens, taken from raw logits; fetched from the device when wanted.

Knows nothing of how tokens are chosen. Shapes: N rows, V vocabulary, K best tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.request import TokenLogprobs
from shoal.core.split import Range
from shoal.model.logits import to_device
from shoal.model.vocab_parallel import vocabulary_of
from shoal.model.vocabulary import Vocabulary

# Bounds the fp32 copy of the logits that one pass over a long prompt makes.
_PROMPT_CHUNK = 64


class HostCopy:
    """Tensors on their way to the host: the copy starts now, `wait` is for it alone.

    Fetching later with `.cpu()` would wait for all that was queued in between.
    """

    __slots__ = ("_arrived", "_tensors")

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            )
            self._arrived = torch.cuda.current_stream(tensors[0].device).record_event()

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


class PendingLogprobs:
    """`TokenLogprobs` of N rows, computed on the device and not yet read."""

    __slots__ = ("_copy", "_top_n")

    def __init__(
        self,
        logits_NV: Tensor,
        token_ids_N: Tensor,
        top_n: Sequence[int],
        vocabulary: Vocabulary,
    ) -> None:
        """Args:
        logits_NV: raw logits; not changed.
        token_ids_N: the token that stands at each row.
        top_n: how many of the best tokens to report for each row.
        """
        self._top_n = tuple(top_n)
        self._copy = HostCopy(token_ids_N, *vocabulary.logprobs(logits_NV, token_ids_N, max(top_n)))

    def rows(self) -> Iterator[TokenLogprobs]:
        token_ids, chosen, ranks, best, best_ids = (t.tolist() for t in self._copy.wait())
        for row, num_best in enumerate(self._top_n):
            # topk leaves the order of equals open; ours is by id.
            pairs = sorted(
                (pair for pair in zip(best_ids[row], best[row], strict=True) if pair[1] > -inf),
                key=lambda pair: (-pair[1], pair[0]),
            )
            yield TokenLogprobs(token_ids[row], chosen[row], ranks[row], tuple(pairs[:num_best]))


def prompt_logprobs(
    logits_NV: Tensor,
    targets: Sequence[int],
    top_n: int,
    *,
    vocab: Range | None = None,
    group: Group | None = None,
) -> list[TokenLogprobs]:
    """What the model thought of `targets`, the token that follows each of N positions.

    Waits for the device.

    Args:
        vocab, group: token ids that the logits are of, and the ranks that have the others; None:
            all of them.
    """
    vocabulary = vocabulary_of(vocab, group)
    token_ids_N = to_device(targets, torch.int64, logits_NV.device)
    chunks = [slice(i, i + _PROMPT_CHUNK) for i in range(0, len(targets), _PROMPT_CHUNK)]
    pending = [
        PendingLogprobs(
            logits_NV[chunk], token_ids_N[chunk], [top_n] * len(token_ids_N[chunk]), vocabulary
        )
        for chunk in chunks
    ]
    return [row for part in pending for row in part.rows()]
