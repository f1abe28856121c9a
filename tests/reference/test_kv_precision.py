"""KV in few bits: what a code means, and what it costs against an fp32 cache.

Every case runs ragged, chunked steps with shared blocks over a cache full of garbage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from paging import PagedRun, open_decoder, run_mixed_steps, worst_difference

from shoal.kernels import LayerKV, RaggedBatch, select
from shoal.kernels.reference import quantize_kv
from shoal.model.decoder import Decoder

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
CODES = list(LARGEST)
REFERENCE = select("reference")

CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "grouped": ("LlamaForCausalLM", 9, 3, {}),
    "window": ("MistralForCausalLM", 8, 2, {"sliding_window": 11, "head_dim": 16}),
    "qk-norm": ("Qwen3ForCausalLM", 8, 8, {"head_dim": 16}),
}

# Of the logits' own spread, root mean square over every token, with attention far sharper than a
# trained model's. One code is 1 part in 254 of a head's largest number for int8, 1 in 16 of each
# number for fp8. Measured: 0.026 and 0.136; a wrong scale, head or slot gives about 1.
TOLERANCE = {torch.int8: 0.04, torch.float8_e4m3fn: 0.2}


@pytest.fixture(scope="module", params=CASES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    architecture, heads, kv_heads, overrides = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return open_decoder(tiny_checkpoint(folder, architecture, heads, kv_heads, **overrides))


@pytest.mark.parametrize("code", CODES, ids=str)
def test_a_cache_of_codes_is_close_to_one_of_numbers(decoder: Decoder, code: torch.dtype) -> None:
    exact, coded = _mixed_logits(decoder, torch.float32), _mixed_logits(decoder, code)
    error = float((coded - exact).square().mean().sqrt() / exact.std())
    assert 0 < error < TOLERANCE[code]


@pytest.mark.parametrize("code", CODES, ids=str)
def test_chunks_and_shared_blocks_change_nothing(decoder: Decoder, code: torch.dtype) -> None:
    """A token reads its own codes too, so it matters not where a Step began."""
    sequences = run_mixed_steps(decoder, code)
    whole = []
    for sequence in sequences:
        run = PagedRun(decoder, kv_dtype=code)
        alone = run.add(sequence.token_ids)
        run.step((alone, 0, len(alone.token_ids)))
        whole.append(torch.stack([alone.logits[p] for p in range(len(alone.token_ids))]))
    # A number that lies between two codes may fall to either side; a wrong read moves logits by
    # far more than one code does.
    assert worst_difference(sequences, whole) < 0.05 * float(whole[0].std())


def test_floats_narrower_or_wider_than_the_model(decoder: Decoder) -> None:
    exact, narrow = _mixed_logits(decoder, torch.float32), _mixed_logits(decoder, torch.bfloat16)
    assert 0 < float((narrow - exact).square().mean().sqrt() / exact.std()) < 0.02


def test_a_bfloat16_model_over_int8(decoder: Decoder, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    exact = _mixed_logits(open_decoder(folder), torch.float32)
    coded = _mixed_logits(open_decoder(folder, torch.bfloat16), torch.int8)
    assert 0 < float((coded - exact).square().mean().sqrt() / exact.std()) < 0.05


@pytest.mark.parametrize("code", CODES, ids=str)
def test_codes_are_the_nearest_and_scales_are_of_each_token_and_head(code: torch.dtype) -> None:
    x_THD = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0))
    x_THD *= torch.logspace(-6, 4, 18).view(6, 3, 1)
    codes, scales_TH = quantize_kv(x_THD, code)
    assert codes.dtype == code and scales_TH.dtype == torch.float32
    expected_scales = np.abs(x_THD.numpy()).max(-1) / LARGEST[code]
    np.testing.assert_allclose(scales_TH.numpy(), expected_scales, rtol=1e-6)
    values = codes.float() * scales_TH[..., None]
    error = (values - x_THD).abs()
    half_a_step = 0.5 * scales_TH[..., None]
    if code != torch.int8:
        # e4m3: three bits of mantissa, subnormals below 2**-6 in steps of 2**-9.
        half_a_step = torch.maximum(x_THD.abs() / 16, scales_TH[..., None] * 2.0**-10)
    assert (error <= half_a_step * (1 + 1e-4)).all()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_zeros_and_numbers_too_small_for_a_scale_become_zero(code: torch.dtype) -> None:
    x_THD = torch.zeros(2, 1, 8)
    x_THD[1] = 1e-45
    codes, scales_TH = quantize_kv(x_THD, code)
    assert not codes.view(torch.uint8).any()
    assert not scales_TH.any()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_storing_touches_its_slots_alone(code: torch.dtype) -> None:
    N, B, H, D = 4, 16, 2, 8
    kv = LayerKV(
        torch.full((N, B, H, D), 3).to(code),
        torch.full((N, B, H, D), 5).to(code),
        torch.full((N, B, H), 7.0),
        torch.full((N, B, H), 9.0),
    )
    slots = torch.tensor([37, 2, 18])
    batch = RaggedBatch(
        positions_T=torch.arange(3),
        slots_T=slots,
        query_lens=[3],
        context_lens=[3],
        block_tables_RB=torch.tensor([[0]]),
    )
    k_THD, v_THD = torch.randn(3, H, D), torch.randn(3, H, D)
    REFERENCE.store_kv(k_THD, v_THD, kv, batch)
    sides = (
        (k_THD, kv.keys_NBHD, kv.key_scales_NBH, 3, 7.0),
        (v_THD, kv.values_NBHD, kv.value_scales_NBH, 5, 9.0),
    )
    for x_THD, cache, scales, old_code, old_scale in sides:
        assert scales is not None
        cache_SHD, scales_SH = cache.float().view(-1, H, D), scales.view(-1, H)
        others = [slot for slot in range(N * B) if slot not in slots.tolist()]
        assert (cache_SHD[others] == old_code).all() and (scales_SH[others] == old_scale).all()
        read = cache_SHD[slots] * scales_SH[slots][..., None]
        torch.testing.assert_close(read, x_THD, rtol=0.07, atol=0.02)


def _mixed_logits(decoder: Decoder, kv_dtype: torch.dtype) -> torch.Tensor:
    """Logits of every computed token of the mixed steps."""
    sequences = run_mixed_steps(decoder, kv_dtype)
    return torch.stack([row for each in sequences for _, row in sorted(each.logits.items())])
