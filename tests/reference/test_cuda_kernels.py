"""Every kernel of the set "cuda" held to the reference on ragged cases.

Marked gpu. The same tests run on a CPU in Triton's interpreter, in a process of their own
(TRITON_INTERPRET=1 must be set before Triton is imported): see test_cuda_interpreted.py. The
interpreter cannot multiply bf16 matrices, so there fp16 stands in for it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import CODES, copy_of, make_batch, make_kv, make_weight, on_device_only

from shoal.kernels import KernelSet, select

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

DTYPES = [torch.float32, HALF]
# Relative to the largest value there: fp32 sums in another order; 16 bits round once or twice.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

MIXED = [(1, 40), (21, 21), (1, 1), (7, 90), (1, 130), (33, 64), (2, 18)]
DECODES = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 200), (1, 64)]


@pytest.fixture(scope="module")
def reference() -> KernelSet:
    return select("reference")


@pytest.fixture(scope="module")
def cuda() -> KernelSet:
    return select("cuda")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    wide_got, wide_want = got.float(), want.float()
    assert torch.isfinite(wide_got).all()
    limit = (tolerance or TOLERANCE[got.dtype]) * max(1.0, float(wide_want.abs().max()))
    difference = float((wide_got - wide_want).abs().max())
    assert difference <= limit, f"off by {difference}, allowed {limit}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (5, 7, 48), (1, 1), (4, 2, 128), (2, 1000)], ids=str)
def test_rms_norm(
    reference: KernelSet, cuda: KernelSet, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = draw(*shape, dtype=dtype) * 5
    weight = draw(*shape[1:], seed=4)
    assert_close(cuda.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_rms_norm_of_part_of_the_heads(reference: KernelSet, cuda: KernelSet) -> None:
    x = draw(6, 9, 32)[:, 2:7]
    weight = draw(5, 32, seed=4)
    assert_close(cuda.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (1, 576)], ids=str)
def test_add_rms_norm(
    reference: KernelSet, cuda: KernelSet, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, y, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=4), draw(shape[1])
    assert cuda.add_rms_norm is not None
    total, normed = cuda.add_rms_norm(x, y, weight, 1e-5)
    assert torch.equal(total, x + y)
    assert_close(normed, reference.rms_norm(x + y, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 128), (2, 2600), (1, 2)], ids=str)
def test_gated_activation(
    reference: KernelSet,
    cuda: KernelSet,
    shape: tuple[int, int],
    activation: Any,
    dtype: torch.dtype,
) -> None:
    x = draw(*shape, dtype=dtype) * 6
    assert_close(cuda.gated_activation(x, activation), reference.gated_activation(x, activation))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [True, False], ids=["qk_norm", "no_norm"])
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 20)], ids=str)
def test_rope_and_store(
    reference: KernelSet,
    cuda: KernelSet,
    heads: tuple[int, int, int],
    has_norm: bool,
    dtype: torch.dtype,
    codes: str,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    rows = [(2, 17), (1, 40)]
    batch = make_batch(rows, DEVICE)
    kv = make_kv(rows, num_kv_heads, head_dim, dtype, CODES[codes], DEVICE)
    want_kv, got_kv = copy_of(kv), copy_of(kv)
    qkv_THD = draw(3, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    qkv_THD[0, -1] = 0.0
    norm_HD = draw(num_heads + num_kv_heads, head_dim, seed=5) if has_norm else None
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    angles = reference.rope_angles(batch.positions_T, inv_freq, 1.0)

    qk_THD = qkv_THD[:, : num_heads + num_kv_heads]
    if norm_HD is not None:
        qk_THD = reference.rms_norm(qk_THD, norm_HD, 1e-5)
    qk_THD = reference.rope(qk_THD, *angles)
    reference.store_kv(
        qk_THD[:, num_heads:], qkv_THD[:, num_heads + num_kv_heads :], want_kv, batch
    )
    assert cuda.rope_and_store is not None
    q_THD = cuda.rope_and_store(qkv_THD.flatten(1), norm_HD, 1e-5, *angles, got_kv, batch)

    assert_close(q_THD, qk_THD[:, :num_heads])
    for got, want in (
        (got_kv.keys_NBHD, want_kv.keys_NBHD),
        (got_kv.values_NBHD, want_kv.values_NBHD),
    ):
        # Codes may fall to the neighbour: in fp8 that is up to an eighth of the largest.
        assert_close(got, want, {"plain": None, "int8": 1 / 100, "fp8": 1 / 13}[codes])
    if want_kv.key_scales_NBH is not None and want_kv.value_scales_NBH is not None:
        assert got_kv.key_scales_NBH is not None
        assert got_kv.value_scales_NBH is not None
        assert_close(got_kv.key_scales_NBH, want_kv.key_scales_NBH, TOLERANCE[dtype])
        assert_close(got_kv.value_scales_NBH, want_kv.value_scales_NBH, TOLERANCE[dtype])
    # Values are not rotated, so their codes are the same but for ties of a division.
    same = got_kv.values_NBHD.float() == want_kv.values_NBHD.float()
    assert float(same.float().mean()) > 0.995


def attend(kernels: KernelSet, rows: list[tuple[int, int]], **changes: Any) -> torch.Tensor:
    case = {
        "heads": (4, 2, 64),
        "dtype": torch.float32,
        "codes": None,
        "window": None,
        "softcap": None,
        "as_graph": False,
        **changes,
    }
    num_heads, num_kv_heads, head_dim = case["heads"]
    batch = make_batch(rows, DEVICE)
    if case["as_graph"]:
        batch = on_device_only(batch)
    kv = make_kv(rows, num_kv_heads, head_dim, case["dtype"], case["codes"], DEVICE)
    q_THD = draw(len(batch.positions_T), num_heads, head_dim, dtype=case["dtype"])
    return kernels.attention(
        q_THD, kv, batch, scale=head_dim**-0.5, window=case["window"], softcap=case["softcap"]
    )


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_attention(
    reference: KernelSet,
    cuda: KernelSet,
    rows: list[tuple[int, int]],
    dtype: torch.dtype,
    codes: str,
) -> None:
    case = {"dtype": dtype, "codes": CODES[codes]}
    assert_close(attend(cuda, rows, **case), attend(reference, rows, **case))


@pytest.mark.parametrize("window", [None, 1, 13, 64], ids=lambda window: f"window_{window}")
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no_cap", "cap"])
def test_attention_with_window_and_softcap(
    reference: KernelSet, cuda: KernelSet, window: int | None, softcap: float | None
) -> None:
    case = {"window": window, "softcap": softcap}
    assert_close(attend(cuda, MIXED, **case), attend(reference, MIXED, **case))


@pytest.mark.parametrize(
    "heads",
    [(9, 3, 64), (7, 1, 128), (2, 1, 80), (40, 2, 20)]
    + ([] if INTERPRETED else [(5, 5, 16), (4, 1, 256), (2, 2, 8)]),
    ids=str,
)
def test_attention_in_any_shape(
    reference: KernelSet, cuda: KernelSet, heads: tuple[int, int, int]
) -> None:
    rows = [(1, 100), (37, 50), (1, 3)]
    assert_close(attend(cuda, rows, heads=heads), attend(reference, rows, heads=heads))


@pytest.mark.parametrize("window", [None, 30])
def test_attention_reads_lengths_on_the_device(
    reference: KernelSet, cuda: KernelSet, window: int | None
) -> None:
    got = attend(cuda, DECODES, as_graph=True, window=window)
    assert_close(got, attend(reference, DECODES, window=window))


def test_attention_of_a_crowd_and_of_a_long_row(reference: KernelSet, cuda: KernelSet) -> None:
    for rows in ([(1, 20 + i) for i in range(12)], [(1, 1500)]):
        assert_close(attend(cuda, rows), attend(reference, rows))


@pytest.mark.parametrize(
    ("weight_format", "minimums"),
    [("int8", False), ("int4", False), ("int4", True), ("fp8", False)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 17] if INTERPRETED else [1, 2, 3, 17, 70])
def test_linear(
    reference: KernelSet,
    cuda: KernelSet,
    num_tokens: int,
    dtype: torch.dtype,
    weight_format: Any,
    minimums: bool,
) -> None:
    weight = make_weight(weight_format, 72, 416, 32, device=DEVICE, minimums=minimums)
    x, bias = draw(num_tokens, 416, dtype=dtype), draw(72, dtype=dtype, seed=6)
    assert_close(cuda.linear(x, weight, bias), reference.linear(x, weight, bias))


@pytest.mark.parametrize("num_tokens", [1, 5] if INTERPRETED else [1, 5, 300])
@pytest.mark.parametrize("weight_format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    ("columns", "group"),
    [(96, 96), (144, 48), (64, 16), (512, 256), (1024, 1024), (20, 20), (30, 6), (14, 2), (66, 3)],
    ids=str,
)
def test_linear_with_any_group(
    reference: KernelSet,
    cuda: KernelSet,
    columns: int,
    group: int,
    weight_format: Any,
    num_tokens: int,
) -> None:
    weight = make_weight(
        weight_format, 10, columns, group, device=DEVICE, scale_dtype=torch.float16
    )
    x = draw(num_tokens, columns)
    assert_close(cuda.linear(x, weight, None), reference.linear(x, weight, None))


def test_every_code_means_what_the_reference_says(cuda: KernelSet) -> None:
    """The columns of a weight, one after the other: the numbers themselves."""
    for weight_format, count in (("int8", 256), ("fp8", 256), ("int4", 16)):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(1, 1)
        if weight_format == "fp8":
            codes[0, 127] = codes[0, 255] = 0  # not a number
        weight = make_weight("int8", 1, 256, 32, device="cpu")
        if weight_format == "int4":
            weight = make_weight("int4", 1, 512, 32, device="cpu")
            codes = codes.view(1, 256)
        elif weight_format == "fp8":
            weight = make_weight("fp8", 1, 256, 32, device="cpu")
        weight = replace(weight, codes=codes.view(weight.codes.dtype).to(DEVICE))
        weight = replace(weight, scales_FG=torch.ones_like(weight.scales_FG).to(DEVICE))
        want = weight.dequantize()[0]
        columns = torch.eye(weight.shape[1], device=DEVICE)
        picked = columns[torch.arange(0, weight.shape[1], 37)]
        for num_tokens in (1, 16):
            for part in picked.split(num_tokens):
                got = cuda.linear(part.contiguous(), weight, None)[:, 0]
                assert_close(got, want[part.argmax(1)], 1e-6)
        assert len(want.unique()) == count - (3 if weight_format == "fp8" else 0)


def test_a_large_batch(reference: KernelSet, cuda: KernelSet) -> None:
    weight = make_weight("int4", 10, 96, 32, device=DEVICE, minimums=True)
    x = draw(300, 96)
    assert_close(cuda.linear(x, weight, None), reference.linear(x, weight, None))


def test_plain_weights_and_empty_batches(reference: KernelSet, cuda: KernelSet) -> None:
    x, weight = draw(3, 20), draw(8, 20, seed=4)
    assert_close(cuda.linear(x, weight, None), reference.linear(x, weight, None))
    quantized = make_weight("int8", 8, 32, 32, device=DEVICE)
    assert cuda.linear(draw(0, 32), quantized, None).shape == (0, 8)
    assert cuda.rms_norm(draw(0, 32), draw(32), 1e-5).shape == (0, 32)
    assert cuda.gated_activation(draw(0, 32), "silu").shape == (0, 16)
