"""The reference kernels: plain torch, any float dtype, any device. They are the definition.

    T tokens   H heads   D head size   F FFN columns   N KV blocks   B tokens in a block

Norms, rope and softmax compute in fp32 and return their input's dtype. Nothing here waits for
the device: what depends on the batch alone is planned once, from host lists.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import gelu, silu

from shoal.kernels import KernelSet
from shoal.kernels.attention_plan import AttentionPlan, plan_attention
from shoal.kernels.batch import LayerKV, RaggedBatch
from shoal.kernels.quantized import QuantizedWeight

_FEW_ROWS = (4, 48)
_LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def linear(
    x_TE: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias_F: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight.T + bias; a weight in few bits is undone to x's dtype first.

    With a few rows on a CPU the product is taken transposed: MKL's sgemm then runs 1.5 to 3
    times faster (docs/log.md).
    """
    weight_FE = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x_TE.dtype)
    if x_TE.device.type != "cpu" or not _FEW_ROWS[0] <= len(x_TE) <= _FEW_ROWS[1]:
        return torch.nn.functional.linear(x_TE, weight_FE, bias_F)
    out_TF = torch.mm(weight_FE, x_TE.t()).t().contiguous()
    return out_TF if bias_F is None else out_TF.add_(bias_F)


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
    """Writes the tokens' keys and values into their slots, as codes where the cache has scales."""
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


def gated_activation(
    gate_up_TF: torch.Tensor, activation: Literal["silu", "gelu_tanh"]
) -> torch.Tensor:
    """activation(gate) * up, of [gate | up] side by side (arXiv 2002.05202)."""
    gate, up = gate_up_TF.chunk(2, -1)
    if activation == "silu":
        return silu(gate).mul_(up)
    return gelu(gate, approximate="tanh").mul_(up)


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
    if len(plans) == 1:  # its tokens are all tokens, in order
        return _attend(q_THD, kv, plans[0], scale, softcap)
    out_THD = torch.empty_like(q_THD)
    for plan in plans:
        some_THD = q_THD.index_select(0, plan.tokens)
        some_THD = _attend(some_THD, kv, plan, scale, softcap)
        out_THD.index_copy_(0, plan.tokens, some_THD)
    return out_THD


def _attend(
    q_THD: torch.Tensor,
    kv: LayerKV,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """All rows of a plan at once; the G query heads of a KV head are folded into its queries.

    R rows   Q queries a row   L keys a row   J = R * H   (KV is never repeated for its G heads)
    """
    R, Q, L = plan.num_rows, plan.num_queries, plan.num_keys
    H, D = kv.keys_NBHD.shape[2:]
    G = q_THD.shape[1] // H
    dtype = q_THD.dtype
    k_JLD = _read(kv.keys_NBHD, kv.key_scales_NBH, plan, dtype).view(R * H, L, D)
    v_JLD = _read(kv.values_NBHD, kv.value_scales_NBH, plan, dtype).view(R * H, L, D)
    q_RHGQD = (q_THD * scale).view(R, Q, H, G, D).permute(0, 2, 3, 1, 4)
    scores = torch.bmm(q_RHGQD.reshape(R * H, G * Q, D), k_JLD.transpose(1, 2))
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if plan.hidden_RQL is not None:
        scores = scores.view(R, H * G, Q, L).masked_fill_(plan.hidden_RQL[:, None], float("-inf"))
    weights = torch.softmax(scores.view(R * H, G * Q, L), -1, dtype=torch.float32)
    o_RHGQD = torch.bmm(weights.to(v_JLD.dtype), v_JLD).view(R, H, G, Q, D)
    return o_RHGQD.permute(0, 3, 1, 2, 4).reshape(q_THD.shape)


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
    gated_activation=gated_activation,
)
