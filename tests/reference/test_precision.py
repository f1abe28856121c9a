"""Which formats weights are kept in: by what is asked, and by what the checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from paging import open_decoder
from safetensors.torch import load_file, save_file

from shoal.core.errors import ConfigError, WeightsError
from shoal.kernels.cpu.step import Session
from shoal.kernels.quantized import quantize, quantize_with_minimums
from shoal.model.names import hf_names
from shoal.model.precision import WeightFormats, choose_formats
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.spec import read_spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(
        tmp_path, "LlamaForCausalLM", 8, 2, hidden_size=64, intermediate_size=96, head_dim=16
    )


def _formats(folder: Path, asked: str) -> WeightFormats:
    spec, source = read_spec(folder), SafetensorsSource(folder)
    return choose_formats(spec, source, hf_names(spec, source.names), asked)  # type: ignore[arg-type]


def _change(folder: Path, part: str, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if part in name and tensors[name].dim() == 2:
            tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})


def test_floats_stay_unless_something_is_asked(folder: Path) -> None:
    for asked in ("auto", "none"):
        formats = _formats(folder, asked)
        assert formats.label is None
        assert (formats.head, formats.layers[0].down) == (None, None)
    assert _formats(folder, "int8").label == "int8"


def test_int4_keeps_the_tables_in_eight_bits(folder: Path) -> None:
    formats = _formats(folder, "int4")
    assert (formats.embedding, formats.head) == ("int8", "int8")
    assert {layer.qkv for layer in formats.layers} == {"int4"}


def test_values_of_a_grid_with_minimums_keep_it(folder: Path) -> None:
    """A dequantised Q4_1 checkpoint: exactly what it was, where symmetric codes lose a quarter."""
    _change(folder, "down_proj", lambda values: quantize_with_minimums(values).dequantize())
    formats = _formats(folder, "int4")
    assert (formats.layers[0].down, formats.layers[0].o) == ("int4_min", "int4")
    assert formats.label == "int4"
    name = "model.layers.0.mlp.down_proj.weight"
    values = load_file(folder / "model.safetensors")[name]
    again = quantize_with_minimums(values).dequantize()
    assert (again - values).abs().max() < 1e-3 * values.abs().max()
    assert (quantize(values, "int4").dequantize() - values).abs().max() > 0.02 * values.abs().max()
    packed = open_decoder(folder, kernels=Session(1), quantize="int4")
    assert packed.precision == "int4"


def test_lopsided_values_have_minimums(folder: Path) -> None:
    _change(folder, "o_proj", lambda values: values.abs() + 1)
    assert _formats(folder, "int4").layers[0].o == "int4_min"


@pytest.mark.parametrize("asked", ["int8", "int4"])
def test_weights_that_are_not_finite_are_named(folder: Path, asked: str) -> None:
    _change(folder, "layers.1.mlp.up_proj", lambda values: values.fill_(torch.inf))
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight: .*inf or nan"):
        open_decoder(folder, kernels=Session(1), quantize=asked)  # type: ignore[arg-type]


def test_rows_that_are_no_whole_groups(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "LlamaForCausalLM", 9, 3)
    with pytest.raises(ConfigError, match="--quantize int4 needs weights whose rows are multiples"):
        open_decoder(folder, kernels=Session(1), quantize="int4")
