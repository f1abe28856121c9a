"""AWQ, GPTQ, compressed-tensors and FP8 folders, held to transformers on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import reference_logits, reference_model, tiny_checkpoint
from gguf_files import write_gguf
from paging import run_mixed_steps, worst_difference
from quantized_files import (
    FILE,
    Writer,
    awq,
    fp8,
    gptq,
    int_quantized,
    packed,
    write_quantized,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.core.errors import UnsupportedModelError, WeightsError
from shoal.core.split import Range
from shoal.kernels import select
from shoal.model.gguf_source import GGUFSource
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder

TOLERANCE = 1e-3
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def ct(layout: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def ints(bits: int, group_size: int, symmetric: bool = True) -> dict[str, Any]:
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
        "actorder": None,
    }


def floats(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

# Writer, config, the format of a projection with 64 columns and of one with 96.
CASES: dict[str, tuple[Writer, dict[str, Any], str | None, str | None]] = {
    "awq": (awq(32), {**AWQ, "group_size": 32}, "int4", "int4"),
    "awq-a-row": (awq(-1), {**AWQ, "group_size": -1}, "int4", "int4"),
    "awq-ragged": (awq(64), {**AWQ, "group_size": 64}, "int4", None),
    "gptq": (gptq(4, 32), GPTQ, "int4", "int4"),
    "gptq-symmetric": (gptq(4, 32, symmetric=True), {**GPTQ, "sym": True}, "int4", "int4"),
    "gptq-v2": (gptq(4, 32, v2=True), {**GPTQ, "checkpoint_format": "gptq_v2"}, "int4", "int4"),
    "gptq-desc-act": (gptq(4, 32, permuted=True), {**GPTQ, "desc_act": True}, None, None),
    "gptq-no-g-idx": (gptq(4, 32, with_g_idx=False), GPTQ, "int4", "int4"),
    "gptq-ragged": (
        gptq(4, 64, with_g_idx=False),
        {**GPTQ, "group_size": 64},
        "int4",
        None,
    ),
    "gptq-8": (gptq(8, 32, symmetric=True), {**GPTQ, "bits": 8}, "int8", "int8"),
    "gptq-8-asymmetric": (gptq(8, 32), {**GPTQ, "bits": 8}, None, None),
    "gptq-dynamic-bits": (gptq(8, 32, symmetric=True), {**GPTQ, "dynamic": {}}, "int8", "int8"),
    "packed-4": (packed(4, 32), ct("pack-quantized", ints(4, 32)), "int4", "int4"),
    "packed-4-zeros": (
        packed(4, 32, symmetric=False),
        ct("pack-quantized", ints(4, 32, False)),
        "int4",
        "int4",
    ),
    "packed-4-ragged": (packed(4, 40), ct("pack-quantized", ints(4, 40)), None, None),
    "packed-4-odd-words": (packed(4, 12), ct("pack-quantized", ints(4, 12)), None, "int4"),
    "packed-4-permuted": (
        packed(4, 32, permuted=True),
        ct("pack-quantized", {**ints(4, 32), "actorder": "group"}),
        None,
        None,
    ),
    "packed-8": (packed(8, -1), ct("pack-quantized", ints(8, -1)), "int8", "int8"),
    "packed-8-zeros": (
        packed(8, 32, symmetric=False),
        ct("pack-quantized", ints(8, 32, False)),
        None,
        None,
    ),
    "int8": (
        int_quantized(-1),
        ct("int-quantized", ints(8, -1), input_activations=DYNAMIC),
        "int8",
        "int8",
    ),
    "int8-zeros": (
        int_quantized(32, symmetric=False),
        ct("int-quantized", ints(8, 32, False)),
        None,
        None,
    ),
    "float-tensor": (
        fp8(None, "weight_scale", dims=1),
        ct("float-quantized", floats("tensor"), input_activations=DYNAMIC),
        "fp8",
        "fp8",
    ),
    "float-channel": (
        fp8((1, 10**6), "weight_scale"),
        ct("float-quantized", floats("channel")),
        "fp8",
        "fp8",
    ),
    "float-group": (
        fp8((1, 32), "weight_scale"),
        ct("float-quantized", floats("group", group_size=32)),
        "fp8",
        "fp8",
    ),
    "float-block": (
        fp8((24, 32), "weight_scale"),
        ct("float-quantized", floats("block", block_structure=[24, 32])),
        "fp8",
        "fp8",
    ),
    "fp8-block": (
        fp8((24, 32), "weight_scale_inv"),
        {**FP8, "weight_block_size": [24, 32]},
        "fp8",
        "fp8",
    ),
    "fp8-ragged": (
        fp8((40, 64), "weight_scale_inv"),
        {**FP8, "weight_block_size": [40, 64]},
        "fp8",
        None,
    ),
    "fp8-tensor": (fp8(None, "weight_scale", dims=0), FP8, "fp8", "fp8"),
    "fbgemm": (fp8((1, 10**6), "weight_scale"), {"quant_method": "fbgemm_fp8"}, "fp8", "fp8"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return tiny_checkpoint(folder, heads=4, kv_heads=2, num_hidden_layers=2, **SHAPE)


@pytest.mark.parametrize("case", CASES)
def test_values_formats_and_logits(case: str, plain: Path, tmp_path: Path) -> None:
    writer, config, format_64, format_96 = CASES[case]
    folder = tmp_path / "quantized"
    model = write_quantized(plain, folder, writer, config)
    expected = dict(model.named_parameters())

    source = SafetensorsSource(folder)
    assert source.names == expected.keys()
    for name, values in expected.items():
        assert source.shape(name) == values.shape
        if "_proj" not in name:
            assert source.format(name) is None
            continue
        rows = len(values)
        assert source.format(name) == (format_64 if values.shape[1] == 64 else format_96)
        assert 0 < source.row_bytes(name) < 4 * values.shape[1]
        torch.testing.assert_close(source.rows(name, 0, rows), values, rtol=0, atol=1e-6)
        for start, stop in ((3, 29), (rows - 1, rows), (0, rows)):
            part = source.rows(name, start, stop)
            torch.testing.assert_close(part, values[start:stop], rtol=0, atol=1e-6)
            if source.format(name) is not None:
                quantized = source.quantized_rows(name, start, stop)
                assert quantized.format == source.format(name)
                assert quantized.shape == part.shape
                torch.testing.assert_close(quantized.dequantize(), part, rtol=0, atol=1e-6)
        for columns in (Range(32, 64), Range(5, 43), Range(0, 8), Range(40, values.shape[1])):
            some = values[3:29, columns.start : columns.stop]
            part = source.rows(name, 3, 29, columns)
            torch.testing.assert_close(part, some, rtol=0, atol=1e-6)
            if source.format(name) is not None and columns.start % 2 == 0:
                quantized = source.quantized_rows(name, 3, 29, columns)
                assert quantized.shape == some.shape
                torch.testing.assert_close(quantized.dequantize(), some, rtol=0, atol=1e-6)

    sequences = run_mixed_steps(_decoder(folder, plain))
    logits = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert logits[0].std() > 0.3
    assert worst_difference(sequences, logits) < TOLERANCE


def test_ignored_modules_stay_plain(plain: Path, tmp_path: Path) -> None:
    config = ct("pack-quantized", ints(4, 32))
    config["ignore"] = ["lm_head", "re:.*q_proj"]
    model = write_quantized(plain, tmp_path / "q", packed(4, 32), config, ignore=("q_proj",))
    source = SafetensorsSource(tmp_path / "q")
    assert source.format("model.layers.0.self_attn.q_proj.weight") is None
    assert source.format("model.layers.0.self_attn.k_proj.weight") == "int4"
    sequences = run_mixed_steps(_decoder(tmp_path / "q", plain))
    logits = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert worst_difference(sequences, logits) < TOLERANCE


def test_a_symmetric_weight_has_no_minimums(plain: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for case, symmetric in (("gptq-symmetric", True), ("gptq", False)):
        write_quantized(plain, tmp_path / case, *CASES[case][:2])
        part = SafetensorsSource(tmp_path / case).quantized_rows(name, 0, 8)
        assert (part.minimums_FG is None) == symmetric


Change = Callable[[dict[str, Tensor]], object]
_UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("awq", lambda t: t.pop(f"{_UP}.scales"), rf"lacks the tensor {_UP}\.scales"),
        (
            "awq",
            lambda t: t.update({f"{_UP}.qzeros": torch.zeros(3, 12, dtype=torch.int32)}),
            r"up_proj\.qzeros is I32 \[3, 12\]; .* need I32 \[2, 12\]",
        ),
        (
            "gptq",
            lambda t: t.update({f"{_UP}.qweight": torch.zeros(8, 96)}),
            r"up_proj\.qweight is F32 \[8, 96\]; .* need I32 \[any, any\]",
        ),
        (
            "gptq",
            lambda t: t.update({f"{_UP}.g_idx": torch.zeros(63, dtype=torch.int32)}),
            r"up_proj\.g_idx is I32 \[63\]; .* need I32 or I64 \[64\]",
        ),
        (
            "gptq",
            lambda t: t.update({f"{_UP}.g_idx": torch.full((64,), 7, dtype=torch.int32)}),
            r"up_proj\.g_idx names groups 7 to 7; there are 2",
        ),
        (
            "packed-4",
            lambda t: t.update({f"{_UP}.weight_shape": torch.tensor([96, 2**40])}),
            r"weight_shape says \[96, 1099511627776\].*corrupt",
        ),
        (
            "packed-4",
            lambda t: t.update({f"{_UP}.weight_shape": torch.tensor([96, -64])}),
            r"weight_shape says \[96, -64\].*corrupt",
        ),
        ("packed-4", lambda t: t.pop(f"{_UP}.weight_scale"), r"up_proj\.weight has no .*_scale"),
        (
            "packed-4",
            lambda t: t.update({f"{_UP}.weight_scale": torch.ones(96, 5)}),
            r"weight_scale has shape \[96, 5\], which .* groups of 32",
        ),
        ("fp8-block", lambda t: t.pop(f"{_UP}.weight_scale_inv"), "is F8_E4M3 and has no"),
        (
            "fp8-block",
            lambda t: t.update({f"{_UP}.weight_scale_inv": torch.ones(9, 9)}),
            r"shape \[9, 9\], .* blocks \(24, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    case: str, change: Change, words: str, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "q"
    write_quantized(plain, folder, *CASES[case][:2])
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    change(tensors)
    save_file(tensors, folder / FILE)
    with pytest.raises(WeightsError, match=words):
        _decoder(folder, plain)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised with bitsandbytes are not supported"),
        ({}, "quantised with unknown are not supported"),
        ({**AWQ, "version": "gemv"}, "AWQ with version 'gemv' .* shoal reads version 'gemm'"),
        ({**AWQ, "bits": 3}, "AWQ with bits 3 is not supported"),
        ({**GPTQ, "bits": 3}, "GPTQ with 3 bits is not supported; shoal reads 4 and 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ in the layout 'marlin'"),
        (ct("nvfp4-pack-quantized", ints(4, 16)), "the format 'nvfp4-pack-quantized'"),
        (ct("pack-quantized", ints(2, 32)), "int weights of 2 bits .* int of 4 and 8"),
        ({**ct("dense", ints(4, 32)), "sparsity_config": {"format": "sparse-24"}}, "sparsity"),
        (
            {**ct("dense", ints(4, 32)), "transform_config": {"config_groups": {"r": {}}}},
            "rotated weights",
        ),
        ({**FP8, "fmt": "e5m2"}, "fp8 of the kind 'e5m2'"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    ],
)
def test_configs_that_are_not_read(
    config: dict[str, Any], words: str, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "q"
    write_quantized(plain, folder, lambda module, weight: ({"weight": weight}, weight), config)
    with pytest.raises(UnsupportedModelError, match=words):
        SafetensorsSource(folder)


def test_codes_without_a_config_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    write_quantized(plain, folder, *CASES["int8"][:2])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"has type I8, and its config\.json says of no quant"):
        _decoder(folder, plain)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_as_codes_are_the_values(kind: str, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(reference_model(plain), path, gguf.GGMLQuantizationType[kind])
    source = GGUFSource(path)
    matrices = [name for name in source.names if len(source.shape(name)) == 2]
    assert len(matrices) == 2 + 2 * 7
    for name in matrices:
        assert source.format(name) == ("int8" if kind == "Q8_0" else "int4")
        quantized = source.quantized_rows(name, 3, 20)
        assert quantized.group_size == 32
        assert torch.equal(quantized.dequantize(), source.rows(name, 3, 20))
        some = source.quantized_rows(name, 3, 20, Range(32, 64))
        assert torch.equal(some.dequantize(), source.rows(name, 3, 20)[:, 32:64])
    assert source.format("output_norm.weight") is None


def test_gguf_k_quants_as_codes_are_the_values(tmp_path: Path) -> None:
    """The gguf package writes no K-quants: random blocks stand in."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    rng = np.random.default_rng(5)
    for kind in (gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K):
        blocks = rng.integers(0, 256, (9, 2, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        if kind.name == "Q4_K":
            blocks[..., :4] = rng.standard_normal((9, 2, 2)).astype(np.float16).view(np.uint8)
        writer.add_tensor(kind.name, blocks.reshape(9, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(path)
    assert (source.format("Q4_K"), source.format("Q6_K")) == ("int4", None)
    quantized = source.quantized_rows("Q4_K", 2, 7)
    assert (quantized.group_size, quantized.scales_FG.dtype) == (32, torch.float32)
    assert torch.equal(quantized.dequantize(), source.rows("Q4_K", 2, 7))
    some = source.quantized_rows("Q4_K", 2, 7, Range(224, 288))  # of both of a row's blocks
    assert torch.equal(some.dequantize(), source.rows("Q4_K", 2, 7)[:, 224:288])


def _decoder(folder: Path, plain: Path) -> Any:
    return load_decoder(
        folder,
        read_spec(plain),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=select("reference"),
    )
