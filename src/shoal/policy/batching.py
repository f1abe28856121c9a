"""How many tokens a Step may hold, where nobody says. Knows nothing of requests or of queues."""

from __future__ import annotations

_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 2048
# Chunks of one long prompt are on several stages at once only if there are several.
_PIPELINE_STEP_TOKENS = 128


def step_tokens(*, is_cuda: bool, num_stages: int, max_num_seqs: int) -> int:
    """Enough to keep a device's arithmetic busy, and one for every sequence.

    Args:
        is_cuda: all devices are GPUs.
    """
    if is_cuda:
        wanted = _CUDA_STEP_TOKENS
    else:
        wanted = _CPU_STEP_TOKENS if num_stages == 1 else _PIPELINE_STEP_TOKENS
    return max(wanted, max_num_seqs)
