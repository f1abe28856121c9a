"""The reference kernels: plain torch, any float dtype, any device. They are the definition.

    T tokens   H heads   D head size   N KV blocks   B tokens in a block

Norms, rope and softmax compute in fp32 and return their input's dtype. Nothing here waits for
the device: what depends on the batch alone is planned once, from host lists. Products are in
`products.py`, mixtures of experts in `reference_experts.py`.
"""

from __future__ import annotations

from functools import partial

import torch

from shoal.kernels import KernelSet
from shoal.kernels.attention_plan import AttentionPlan, plan_attention
from shoal.kernels.batch import LayerKV, RaggedBatch
from shoal.kernels.products import gated_activation, linear
from shoal.kernels.reference_experts import experts, route

_LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x over the last dimension) * weight (arXiv 1910.07467).

    `weight` is fp32 and broadcasts over x: [E], or [H, D] where each head has its own.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).mul_(weight).to(x.dtype)


def rope_angles(
    positions_T: torch.Tensor, inv_freq: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as `rope` wants them, [T, 1, D] each in fp32, multiplied by `factor`.

    Both halves of a head turn by the same angles; sin carries the sign of each half.
    """
    angles_TD = torch.outer(positions_T.float(), inv_freq)
    cos, sin = angles_TD.cos() * factor, angles_TD.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rope(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotates (x[i], x[i + D/2]) pairs (arXiv 2104.09864, in the half-split layout)."""
    wide = x_THD.float()
    half = x_THD.shape[-1] // 2
    return torch.addcmul(wide * cos_T1D, wide.roll(half, -1), sin_T1D).to(x_THD.dtype)


def store_kv(k_THD: torch.Tensor, v_THD: torch.Tensor, kv: LayerKV, batch: RaggedBatch) -> None:
    """Writes the tokens' keys and values into their slots, as codes where the cache has scales.

    Tokens that another rank holds are left out.
    """
    if batch.held is not None:
        k_THD, v_THD = k_THD[batch.held.stored_S], v_THD[batch.held.stored_S]
    _store(k_THD, kv.keys_NBHD, kv.key_scales_NBH, batch)
    _store(v_THD, kv.values_NBHD, kv.value_scales_NBH, batch)


def _store(
    x_THD: torch.Tensor,
    cache_NBHD: torch.Tensor,
    scales_NBH: torch.Tensor | None,
    batch: RaggedBatch,
) -> None:
    if scales_NBH is None:
        x_THD = x_THD.to(cache_NBHD.dtype)
    else:
        x_THD, scales_TH = quantize_kv(x_THD, cache_NBHD.dtype)
        scales_NBH.view(-1, scales_NBH.shape[2]).index_copy_(0, batch.slots_T, scales_TH)
        x_THD, cache_NBHD = x_THD.view(torch.uint8), cache_NBHD.view(torch.uint8)
    cache_NBHD.view(-1, *cache_NBHD.shape[2:]).index_copy_(0, batch.slots_T, x_THD)


def quantize_kv(x_THD: torch.Tensor, code_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, H, D] and their fp32 scales [T, H]: the largest of a head takes the largest code.

    Codes are the nearest there are (ties to even); int8 uses -127 to 127. What is too small for
    an fp32 scale becomes 0.
    """
    largest = _LARGEST_CODE[code_dtype]
    wide = x_THD.float()
    scales_TH1 = wide.abs().amax(-1, keepdim=True) / largest
    codes = (wide / scales_TH1).masked_fill_(scales_TH1 == 0, 0.0).clamp_(-largest, largest)
    if code_dtype == torch.int8:
        codes.round_()
    return codes.to(code_dtype), scales_TH1.squeeze(-1)


def attention(
    q_THD: torch.Tensor,
    kv: LayerKV,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of each token over its own sequence's KV, itself included.

    Keys and values of the batch's own tokens are read from the cache too (`store_kv` comes
    first), so that in few bits a token means the same to itself as to those after it. They are
    multiplied in q's dtype.

    Args:
        scale: multiplies q·k.
        window: newest tokens each token sees; None: all.
        softcap: scores become softcap * tanh(scores / softcap).
    """
    softmax = partial(torch.softmax, dim=-1, dtype=torch.float32)
    out_THD = torch.empty_like(q_THD)
    for plan in _plans(q_THD, kv, batch, window):
        scores = _scores(q_THD, kv, plan, scale, softcap)
        _put(out_THD, plan, _weigh(softmax(scores), kv, plan, q_THD.dtype))
    return out_THD


def partial_attention(
    q_THD: torch.Tensor,
    kv: LayerKV,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` over the keys that are here, and what it takes to merge it with others'.

    Returns:
        [T, H, D], zeros where a token sees none; and fp32 [T, H], the logarithm of the sum of the
        exponentials of its scores (-inf: none), as in flash-decoding: parts with weights
        softmax(those) sum to the attention over all keys.
    """
    out_THD = torch.empty_like(q_THD)
    sums_TH = torch.empty(q_THD.shape[:2], device=q_THD.device)
    for plan in _plans(q_THD, kv, batch, window):
        scores = _scores(q_THD, kv, plan, scale, softcap).float()
        sums = scores.logsumexp(-1, keepdim=True)
        # Nothing seen: scores of -inf become weights of 0, not NaN.
        weights = (scores - sums.clamp(min=torch.finfo(torch.float32).min)).exp()
        _put(out_THD, plan, _weigh(weights, kv, plan, q_THD.dtype))
        _put(sums_TH, plan, _by_token(sums, plan).squeeze(-1))
    return out_THD, sums_TH


def _plans(
    q_THD: torch.Tensor, kv: LayerKV, batch: RaggedBatch, window: int | None
) -> list[AttentionPlan]:
    num_heads = q_THD.shape[1]
    block_size, num_kv_heads = kv.keys_NBHD.shape[1:3]
    key = ("reference", window, num_heads, num_kv_heads)
    if key not in batch.plans:
        batch.plans[key] = plan_attention(
            batch,
            window,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
        )
    plans: list[AttentionPlan] = batch.plans[key]
    return plans


def _scores(
    q_THD: torch.Tensor, kv: LayerKV, plan: AttentionPlan, scale: float, softcap: float | None
) -> torch.Tensor:
    """[R, H, G * Q, L] of all rows of a plan, -inf where a query does not see a key.

    The G query heads of a KV head are folded into its queries, and KV is never repeated for them.

    R rows   Q queries a row   L keys a row
    """
    R, Q, L = plan.num_rows, plan.num_queries, plan.num_keys
    H, D = kv.keys_NBHD.shape[2:]
    G = q_THD.shape[1] // H
    some_THD = q_THD if len(q_THD) == R * Q else q_THD.index_select(0, plan.tokens)
    k_JLD = _read(kv.keys_NBHD, kv.key_scales_NBH, plan, q_THD.dtype).view(R * H, L, D)
    q_RHGQD = (some_THD * scale).view(R, Q, H, G, D).permute(0, 2, 3, 1, 4)
    scores = torch.bmm(q_RHGQD.reshape(R * H, G * Q, D), k_JLD.transpose(1, 2))
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if plan.hidden_RQL is not None:
        scores.view(R, H * G, Q, L).masked_fill_(plan.hidden_RQL[:, None], float("-inf"))
    return scores.view(R, H, G * Q, L)


def _weigh(
    weights_RHQL: torch.Tensor, kv: LayerKV, plan: AttentionPlan, dtype: torch.dtype
) -> torch.Tensor:
    """Sums of a plan's values, by token and head."""
    shape = weights_RHQL.shape
    v_JLD = _read(kv.values_NBHD, kv.value_scales_NBH, plan, dtype)
    v_JLD = v_JLD.view(-1, plan.num_keys, kv.values_NBHD.shape[-1])
    o_JQD = torch.bmm(weights_RHQL.flatten(0, 1).to(dtype), v_JLD)
    return _by_token(o_JQD.view(*shape[:3], -1), plan)


def _by_token(x_RHQD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """[R, H, G * Q, D] → [R * Q, H * G, D]."""
    R, H, GQ, D = x_RHQD.shape
    x_RHGQD = x_RHQD.view(R, H, GQ // plan.num_queries, plan.num_queries, D)
    return x_RHGQD.permute(0, 3, 1, 2, 4).reshape(R * plan.num_queries, -1, D)


def _put(to_THD: torch.Tensor, plan: AttentionPlan, some_THD: torch.Tensor) -> None:
    if len(some_THD) == len(to_THD):  # a single plan's tokens are all tokens, in order
        to_THD.copy_(some_THD)
    else:
        to_THD.index_copy_(0, plan.tokens, some_THD)


def _read(
    cache_NBHD: torch.Tensor,
    scales_NBH: torch.Tensor | None,
    plan: AttentionPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The plan's rows of the cache, [R*H*L, D]."""
    rows = cache_NBHD.view(-1, cache_NBHD.shape[-1])
    if scales_NBH is None:
        return rows.index_select(0, plan.cache_rows).to(dtype)
    # Not every device gathers float8; bytes it can.
    codes = rows.view(torch.uint8).index_select(0, plan.cache_rows).view(cache_NBHD.dtype)
    scales = scales_NBH.view(-1, 1).index_select(0, plan.cache_rows)
    return codes.float().mul_(scales).to(dtype)


KERNELS = KernelSet(
    name="reference",
    linear=linear,
    rms_norm=rms_norm,
    rope_angles=rope_angles,
    rope=rope,
    store_kv=store_kv,
    attention=attention,
    partial_attention=partial_attention,
    gated_activation=gated_activation,
    route=route,
    experts=experts,
)
