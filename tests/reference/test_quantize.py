"""`quantize`: how near it comes, what it keeps, what it refuses."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import quantized
from shoal.kernels.quantized import QuantizedWeight, pack_int4, quantize

FORMATS: tuple[Any, ...] = ("int8", "int4", "fp8")


def drawn(rows: int = 64, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, got: QuantizedWeight) -> float:
    return float((got.dequantize() - weight).pow(2).sum() / weight.pow(2).sum())


@pytest.mark.parametrize(
    ("format_", "bits_per_weight", "largest_error"),
    [("int8", 8.5, 3e-5), ("int4", 4.5, 6.7e-3), ("fp8", 8 + 32 / 256, 8e-4)],
)
def test_size_and_squared_error_of_normal_weights(
    format_: Any, bits_per_weight: float, largest_error: float
) -> None:
    weight = drawn()
    got = quantize(weight, format_)
    assert got.shape == weight.shape
    assert got.nbytes * 8 / weight.numel() == bits_per_weight
    assert 0 < relative_error(weight, got) < largest_error


@pytest.mark.parametrize(("format_", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_no_worse_than_ggufs_own_rounding(format_: Any, kind: str) -> None:
    weight = drawn() * torch.linspace(0.01, 3, 256)
    type_ = gguf.GGMLQuantizationType[kind]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), type_), type_))
    ours = (quantize(weight, format_).dequantize() - weight).pow(2).sum()
    least = {"int8": 0.999, "int4": 0.95}[format_]
    assert ours < least * (theirs - weight).pow(2).sum()


@pytest.mark.parametrize("format_", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [2, 16, 32, 128, 256])
def test_groups_of_any_size(format_: Any, group_size: int) -> None:
    weight = drawn()
    got = quantize(weight, format_, group_size)
    assert got.group_size == group_size
    assert got.scales_FG.dtype == torch.float16
    by_hand = weight.view(64, -1, group_size).abs().amax(-1)
    steps = got.scales_FG.float().abs() * {"int8": 127, "int4": 8}[format_]
    assert ((steps / by_hand) < 1.25).all() and ((steps / by_hand) > 0.8).all()


@pytest.mark.parametrize("format_", FORMATS)
def test_chunks_are_only_a_matter_of_memory(format_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(37, 96)
    whole = quantize(weight, format_)
    monkeypatch.setattr(quantized, "_CHUNK_VALUES", 500)
    parts = quantize(weight, format_)
    assert torch.equal(whole.codes.view(torch.uint8), parts.codes.view(torch.uint8))
    assert torch.equal(whole.scales_FG, parts.scales_FG)


@pytest.mark.parametrize(("format_", "lowest", "top"), [("int8", -127, 128), ("int4", -8, 8)])
def test_whole_codes_come_back(format_: Any, lowest: int, top: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(lowest, top, (16, 64), generator=generator)
    codes[:, ::32] = lowest  # every group uses its whole range
    weight = codes * 0.25
    assert torch.equal(quantize(weight, format_).dequantize(), weight)


def test_float8_numbers_come_back() -> None:
    weight = drawn(16, 64).to(torch.float8_e4m3fn).float() * 0.25
    weight[:, 5] = 448 * 0.25
    assert torch.equal(quantize(weight, "fp8").dequantize(), weight)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros_in_every_dtype(format_: Any, dtype: torch.dtype) -> None:
    weight = drawn(8, 64).to(dtype)
    weight[:, ::3] = 0
    weight[2] = 0
    before = weight.clone()
    values = quantize(weight, format_).dequantize()
    assert (values[weight == 0] == 0).all()
    assert torch.equal(weight, before), "the weight itself must not change"


def test_one_group_is_not_changed_in_place() -> None:
    weight = drawn(1, 32)  # its transpose needs no copy
    before = weight.clone()
    for format_ in FORMATS:
        quantize(weight, format_)
        assert torch.equal(weight, before)


@settings(max_examples=60, deadline=None)
@given(
    value=st.floats(-(2.0**127), 2.0**127, width=32),
    other=st.floats(-(2.0**127), 2.0**127, width=32),
    format_=st.sampled_from(FORMATS),
)
def test_any_finite_values_give_finite_ones(value: float, other: float, format_: Any) -> None:
    weight = torch.full((2, 64), value)
    weight[1, ::5] = other
    values = quantize(weight, format_).dequantize()
    assert values.isfinite().all()
    if 1e-3 < abs(value) < 1e4:  # an all-equal group, within fp16's precise range
        torch.testing.assert_close(values[0], weight[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(format_: Any, bad: float) -> None:
    weight = drawn(4, 64)
    weight[3, 7] = bad
    with pytest.raises(ValueError, match="holds inf or nan"):
        quantize(weight, format_)


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="100 columns are no whole int4 groups of 32"):
        quantize(drawn(4, 100), "int4")
    with pytest.raises(ValueError, match="are no whole int8 groups of 0"):
        quantize(drawn(4, 64), "int8", 0)
    with pytest.raises(ValueError, match="no whole int4 groups of 3"):
        quantize(drawn(4, 6), "int4", 3)
    with pytest.raises(ValueError, match=r"shape \[4\]; needed \[rows, columns\]"):
        quantize(torch.ones(4), "int8")
    assert quantize(drawn(4, 100), "fp8").group_size == 100


def test_int4_keeps_the_even_column_in_the_low_bits() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_int4(codes).tolist() == [[0x21, 0x0F]]
