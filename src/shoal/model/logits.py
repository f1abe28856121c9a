"""What is done to logits before a token is chosen: masks, biases, bans, penalties, cut-offs.

Each function changes its rows in place and costs only what those rows ask for. None waits
for the device, except that on a CPU (where there is nothing to wait for) `cutoff` may look
at values. Knows nothing of requests, noise or logprobs.

Shapes: R rows, V vocabulary, W bytes of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIMIT = 1e30
"""Logits are clamped to ± this: finite, so only what is forbidden is -inf, and still finite
after the strongest penalty and the lowest temperature."""

_NUM_BEST_FIRST = 1024
"""How many of the best tokens a CPU sorts before it sorts them all to find a top-p cut."""


def to_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A small host list as a tensor, copied without waiting for the device's queue."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def finite_(logits_RV: Tensor) -> Tensor:
    """Bring infinities and NaNs into [-LIMIT, LIMIT] (NaN lowest), in place."""
    return logits_RV.nan_to_num_(nan=-LIMIT, posinf=LIMIT, neginf=-LIMIT).clamp_(-LIMIT, LIMIT)


def apply_masks_(
    logits_RV: Tensor, rows: Sequence[int], masks: Sequence[bytes], first_id: int = 0
) -> None:
    """Forbid (-inf) in `rows` what their little-endian bitmask does not allow.

    Token ids beyond the end of a mask (a padded vocabulary) are forbidden too.

    Args:
        masks: of the whole vocabulary.
        first_id: token id of the first logit.
    """
    device, num_ids = logits_RV.device, logits_RV.shape[1]
    if not num_ids:
        return
    first, skipped = first_id // 8, first_id % 8
    width = -(-(skipped + num_ids) // 8)
    joined = bytearray().join(mask[first : first + width].ljust(width, b"\0") for mask in masks)
    mask_bytes = torch.frombuffer(joined, dtype=torch.uint8).view(len(rows), width)
    if device.type == "cuda":
        mask_bytes = mask_bytes.pin_memory().to(device, non_blocking=True)
    bits_8 = torch.arange(8, dtype=torch.uint8, device=device)
    allowed_RV = ((mask_bytes[:, :, None] >> bits_8) & 1).flatten(1)
    allowed_RV = allowed_RV[:, skipped : skipped + num_ids].bool()
    index_R = to_device(rows, torch.int64, device)
    logits_RV[index_R] = logits_RV[index_R].masked_fill(~allowed_RV, -math.inf)


def add_biases_(
    logits_RV: Tensor, rows: Sequence[int], token_ids: Sequence[int], biases: Sequence[float]
) -> None:
    """Add biases[i] to the logit of token_ids[i] in rows[i]; no (row, id) pair comes twice."""
    where = _pairs(logits_RV, rows, token_ids)
    logits_RV[where] += to_device(biases, logits_RV.dtype, logits_RV.device)


def ban_(
    logits_RV: Tensor,
    rows: Sequence[int],
    token_ids: Sequence[int],
    everywhere: Callable[[Tensor], Tensor] = lambda flags_R: flags_R,
) -> None:
    """Forbid token_ids[i] in rows[i], unless that would leave the row without any token.

    A row may have only stop tokens left where a grammar's mask allows nothing else.

    Args:
        everywhere: whether flags [R] are set on all ranks, where the vocabulary has several.
    """
    where = _pairs(logits_RV, rows, token_ids)
    before = logits_RV[where]
    logits_RV[where] = -math.inf
    dead_R = everywhere((logits_RV == -math.inf).all(dim=-1))
    logits_RV[where] = torch.where(dead_R[where[0]], before, -math.inf)


def penalise_(
    logits_RV: Tensor,
    prompt_seen_RV: Tensor,
    output_counts_RV: Tensor,
    repetition: Sequence[float],
    frequency: Sequence[float],
    presence: Sequence[float],
) -> None:
    """Repetition penalty over prompt and output, then frequency and presence over output.

    As in vLLM (`apply_penalties`): positive logits of tokens seen are divided by the
    repetition penalty (arXiv 1909.05858, section 4.1), negative ones multiplied.
    """
    device, dtype = logits_RV.device, logits_RV.dtype
    repetition_R1, frequency_R1, presence_R1 = (
        to_device(values, dtype, device)[:, None] for values in (repetition, frequency, presence)
    )
    in_output_RV = output_counts_RV > 0
    factor_RV = torch.where(prompt_seen_RV | in_output_RV, repetition_R1, 1.0)
    logits_RV.copy_(torch.where(logits_RV > 0, logits_RV / factor_RV, logits_RV * factor_RV))
    logits_RV -= frequency_R1 * output_counts_RV
    logits_RV -= presence_R1 * in_output_RV


def cutoff(
    logits_RV: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]
) -> Tensor:
    """The least logit that min-p, then top-k, then top-p (vLLM's order) keep: [R, 1].

    A cut is a value, so tokens that tie with the last one kept are kept as well: no choice
    among equals depends on an order. Probabilities are of the temperature-scaled logits;
    top-p's are renormalised over what the cuts before it left. 0, 1.0 and 0.0 switch a row's
    top-k, top-p and min-p off.
    """
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    # A row where all is forbidden has no best; anything finite keeps NaN out.
    best_R1 = logits_RV.amax(dim=-1, keepdim=True).clamp_(min=-1e38)
    log_min_p = [math.log(value) if value > 0 else -math.inf for value in min_p]
    cut_R1 = best_R1 + to_device(log_min_p, torch.float32, device)[:, None]
    if any(top_k):
        ranks = [min(k or vocab_size, vocab_size) for k in top_k]
        longest = max(min(k, vocab_size) for k in top_k)
        index_R1 = to_device(ranks, torch.int64, device)[:, None] - 1
        values_RK = logits_RV.topk(longest, dim=-1).values
        kth_R1 = values_RK.gather(1, index_R1.clamp(max=longest - 1))
        limits_R1 = to_device(top_k, torch.int64, device)[:, None] > 0
        cut_R1 = torch.where(limits_R1, torch.maximum(cut_R1, kth_R1), cut_R1)
    if any(p < 1.0 for p in top_p):
        top_p_R1 = to_device(top_p, torch.float64, device)[:, None]
        cut_R1 = torch.maximum(cut_R1, _top_p_cut(logits_RV, best_R1, cut_R1, top_p_R1))
    return cut_R1


def first_reaching(values_RK: Tensor, best_R1: Tensor, wanted_R1: Tensor) -> Tensor:
    """The first of the descending values at which the weights' sum is `wanted`, or -inf."""
    # In fp64, so that the order in which a device adds up cannot move a cut.
    sums_RK = (values_RK - best_R1).exp_().double().cumsum(dim=-1)
    num_short_R1 = (sums_RK < wanted_R1).sum(dim=-1, keepdim=True)
    last = values_RK.shape[1] - 1
    found_R1 = values_RK.gather(1, num_short_R1.clamp(max=last))
    return found_R1.masked_fill(num_short_R1 > last, -math.inf)


def _top_p_cut(logits_RV: Tensor, best_R1: Tensor, cut_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    weights_RV = (logits_RV - best_R1).exp_().masked_fill_(logits_RV < cut_R1, 0.0)
    wanted_R1 = top_p_R1 * weights_RV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    off_R1 = top_p_R1 >= 1.0
    vocab_size = logits_RV.shape[1]
    if logits_RV.device.type != "cpu" or vocab_size <= _NUM_BEST_FIRST:
        return first_reaching(_sorted(logits_RV), best_R1, wanted_R1).masked_fill(off_R1, -math.inf)
    head_RK = logits_RV.topk(_NUM_BEST_FIRST, dim=-1).values
    found_R1 = first_reaching(head_RK, best_R1, wanted_R1).masked_fill(off_R1, -math.inf)
    unsure = ((found_R1 == -math.inf) & ~off_R1)[:, 0].nonzero()[:, 0]
    if len(unsure):
        sorted_UV = _sorted(logits_RV[unsure])
        found_R1[unsure] = first_reaching(sorted_UV, best_R1[unsure], wanted_R1[unsure])
    return found_R1


def _sorted(logits_RV: Tensor) -> Tensor:
    return logits_RV.sort(dim=-1, descending=True).values


def _pairs(
    logits_RV: Tensor, rows: Sequence[int], token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    device = logits_RV.device
    return to_device(rows, torch.int64, device), to_device(token_ids, torch.int64, device)
