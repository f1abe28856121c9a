"""Scores whose argmax is a token drawn by Gumbel-max, after temperature, min-p, top-k and top-p.

argmax(logits + Gumbel noise) is distributed as softmax(logits) (Gumbel 1954; Maddison et
al., arXiv 1411.0030). The noise of a token depends on no other token, so where few survive
the cuts it is made for those alone: the result is the same to the bit.

Knows nothing of masks, penalties or greedy rows. Shapes: R rows, V token ids held here, K
survivors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.core.request import SamplingParams
from shoal.model.logits import cutoff, to_device
from shoal.model.philox import key_words, noise_at, noise_range

# Noise for one token costs that of the four that share its counter; scattered, yet more.
_SPARSE_SHARE = 8


AddNoise = Callable[[Tensor, Sequence[int], Sequence[int], int], None]
Cutoff = Callable[[Tensor, Sequence[int], Sequence[float], Sequence[float]], Tensor]


def add_noise(
    logits_RV: Tensor, seeds: Sequence[int], positions: Sequence[int], first_id: int = 0
) -> None:
    """Adds the Gumbel noise of each row's seed (64 bits) and position, in place.

    Args:
        first_id: token id of the first logit.
    """
    words = [word for seed in seeds for word in key_words(seed)]
    keys_R2 = to_device(words, torch.int64, logits_RV.device).view(-1, 2)
    positions_R = to_device(positions, torch.int64, logits_RV.device)
    logits_RV += noise_range(keys_R2, positions_R, first_id, first_id + logits_RV.shape[1])


def perturb_(
    logits_RV: Tensor,
    sampling: Sequence[SamplingParams],
    positions: Sequence[int],
    noise: AddNoise = add_noise,
    first_id: int = 0,
    cutoff: Cutoff = cutoff,
) -> None:
    """Turns logits, which must be finite or -inf, into scores: a row's token has the best.

    Args:
        sampling: every row's parameters, with temperature > 0 and a seed.
        positions: absolute position of the token to draw.
        noise: a faster way to add it, where there is one.
        first_id: token id of the first logit.
        cutoff: as `logits.cutoff`, where there are logits elsewhere too.
    """
    device = logits_RV.device
    logits_RV /= to_device([p.temperature for p in sampling], torch.float32, device)[:, None]
    sparse = _cut_(logits_RV, sampling, cutoff)
    if not logits_RV.shape[1]:
        return
    dense = sorted(set(range(len(sampling))) - set(sparse))

    seeds = [p.seed or 0 for p in sampling]
    if dense:
        rows = to_device(dense, torch.int64, device)
        logits_DV = logits_RV[rows] if sparse else logits_RV
        noise(logits_DV, [seeds[i] for i in dense], [positions[i] for i in dense], first_id)
        if sparse:
            logits_RV[rows] = logits_DV
    if sparse:
        words = [word for seed in seeds for word in key_words(seed)]
        keys_R2 = to_device(words, torch.int64, device).view(-1, 2)
        positions_R = to_device(positions, torch.int64, device)
        rows = to_device(sparse, torch.int64, device)
        row_K, columns_K = (logits_RV[rows] > -torch.inf).nonzero(as_tuple=True)
        rows_K = rows[row_K]
        noise_K = noise_at(keys_R2[rows_K], positions_R[rows_K], columns_K + first_id)
        logits_RV[rows_K, columns_K] += noise_K


def _cut_(logits_RV: Tensor, sampling: Sequence[SamplingParams], cutoff: Cutoff) -> list[int]:
    """Forbid (-inf) what min-p, top-k and top-p drop; returns rows known to keep few."""
    device, num_ids = logits_RV.device, logits_RV.shape[1]
    limited = [i for i, p in enumerate(sampling) if p.top_k or p.top_p < 1.0 or p.min_p]
    if not limited:
        return []
    rows = to_device(limited, torch.int64, device)
    logits_LV = logits_RV[rows]
    params = [sampling[i] for i in limited]
    cut_L1 = cutoff(
        logits_LV, [p.top_k for p in params], [p.top_p for p in params], [p.min_p for p in params]
    )
    keep_LV = logits_LV >= cut_L1
    logits_RV[rows] = logits_LV.masked_fill_(~keep_LV, -torch.inf)
    if device.type != "cpu":
        # Counting survivors would mean waiting for the device.
        return []
    counts = keep_LV.sum(dim=-1).tolist()
    return [i for i, n in zip(limited, counts, strict=True) if n * _SPARSE_SHARE <= num_ids]
