"""Counter-based noise: the Gumbel variate of (seed, position, token id), wherever it is asked.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
torch int64 arithmetic: no state, so any row and any range of the vocabulary can be computed
alone, on any device, with the same bits.

    counter = (token_id // 4, position low, position high, 0)    key = (seed low, seed high)
    output word token_id % 4  →  uniform in (0, 1)  →  Gumbel

Knows nothing of logits or sampling parameters. Shapes: R rows, K token ids, B counters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 4
"""Random words, and so token ids, per counter."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# On a CPU the ~100 passes of Philox pay when their operands stay in the cache.
_CPU_CHUNK = 16_384


def noise_range(keys_R2: Tensor, positions_R: Tensor, low: int, high: int) -> Tensor:
    """Gumbel noise of the token ids in [low, high): fp32 [R, high - low].

    Args:
        keys_R2: low and high 32-bit word of each row's seed, int64.
        positions_R: absolute position of the token to sample, int64.
    """
    device = keys_R2.device
    first = low // LANES
    blocks_B = torch.arange(first, -(-high // LANES), device=device)
    num_rows, num_blocks = len(keys_R2), len(blocks_B)
    row_step, block_step = num_rows or 1, num_blocks or 1
    if device.type == "cpu":
        row_step, block_step = max(1, _CPU_CHUNK // block_step), _CPU_CHUNK
    noise_RBL = torch.empty(num_rows, num_blocks, LANES, device=device)
    for row in range(0, num_rows, row_step):
        rows = slice(row, row + row_step)
        for block in range(0, num_blocks, block_step):
            blocks = slice(block, block + block_step)
            words = _words(keys_R2[rows, None], positions_R[rows, None], blocks_B[None, blocks])
            for lane, word in enumerate(words):
                noise_RBL[rows, blocks, lane] = gumbel(word)
    return noise_RBL.flatten(1)[:, low - first * LANES : high - first * LANES]


def noise_at(keys_K2: Tensor, positions_K: Tensor, token_ids_K: Tensor) -> Tensor:
    """Gumbel noise of single token ids, each with its own row's key and position: fp32 [K]."""
    words_LK = torch.stack(_words(keys_K2, positions_K, token_ids_K // LANES))
    return gumbel(words_LK.gather(0, (token_ids_K % LANES)[None])[0])


def key_words(seed: int) -> tuple[int, int]:
    """The Philox key of a 64-bit seed: its low and its high 32-bit word."""
    return seed & _MASK, (seed >> 32) & _MASK


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel variates, fp32 and always finite, from 32-bit words (int64 tensor).

    With u = (word + 1/2) / 2**32 the variate is -log(-log(1 - u)): large ones come from small
    u, where fp32 is dense, so the tail that decides an argmax has all 32 bits of the word.
    """
    uniform = words.float().add_(0.5).mul_(2.0**-32)
    # The largest words round to 1.0, whose logarithm would be infinite.
    uniform.clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def philox_4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter (four words) and key (two words).

    All are int64 tensors of 32-bit words that broadcast together. A product of two words
    wraps around int64's sign, but its two halves are what they would be unsigned.
    """
    # Not broadcast_shapes: that imports sympy, half a second of the first sampled token.
    words = torch.broadcast_tensors(*counter, *key)  # type: ignore[no-untyped-call]
    c0, c1, c2, c3 = (word.clone() for word in words[:4])
    k0, k1 = key
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        torch.mul(c0, _MULTIPLIERS[0], out=product0)
        torch.mul(c2, _MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        # c1 and c3 keep the products' high halves: the next round masks them away.
        c1, product1 = product1, c1
        c3, product0 = product0, c3
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _words(keys: Tensor, positions: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    """The words of the counters `blocks`; `keys` has one axis more, of size 2, at the end."""
    counter = (blocks, positions & _MASK, positions >> 32, torch.zeros_like(positions))
    return philox_4x32_10(counter, (keys[..., 0], keys[..., 1]))
