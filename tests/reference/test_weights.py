"""Weights from GGUF files of every kind, and checkpoints that are not what they should be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import reference_logits, reference_model, tiny_checkpoint
from gguf_files import write_gguf
from paging import open_decoder, run_mixed_steps, worst_difference
from safetensors.torch import load_file, save_file

from shoal.core.errors import UnsupportedModelError, WeightsError
from shoal.core.split import Range
from shoal.kernels import select
from shoal.model.gguf_blocks import DEQUANTIZE
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder

TOLERANCE = 1e-3
F32 = gguf.GGMLQuantizationType.F32

# Quantised rows must be whole blocks of 32.
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
GEMMA = {
    "num_hidden_layers": 7,  # the sixth sees everything
    "sliding_window": 6,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": ROPES["linear"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
FILES: dict[str, tuple[str, int, int, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", 4, 2, {}, "F32"),
    "llama-tied": ("LlamaForCausalLM", 4, 2, {"tie_word_embeddings": True}, "F32"),
    "llama-llama3": ("LlamaForCausalLM", 4, 2, {"rope_parameters": ROPES["llama3"]}, "F32"),
    "llama-biases": ("LlamaForCausalLM", 4, 2, {"attention_bias": True, "mlp_bias": True}, "F32"),
    "llama-wide-heads": ("LlamaForCausalLM", 8, 4, {}, "F16"),
    "mistral": ("MistralForCausalLM", 4, 1, {"sliding_window": None}, "F16"),
    "qwen2": ("Qwen2ForCausalLM", 4, 2, {}, "BF16"),
    "qwen2-yarn": ("Qwen2ForCausalLM", 4, 2, {"rope_parameters": ROPES["yarn"]}, "F32"),
    "qwen3": ("Qwen3ForCausalLM", 4, 2, {}, "Q8_0"),
    "gemma3": ("Gemma3ForCausalLM", 4, 1, GEMMA, "F32"),
    "llama-q4_0": ("LlamaForCausalLM", 4, 2, {}, "Q4_0"),
    "llama-q4_1": ("LlamaForCausalLM", 4, 2, {}, "Q4_1"),
    "llama-q5_0": ("LlamaForCausalLM", 4, 2, {}, "Q5_0"),
    "llama-q5_1": ("LlamaForCausalLM", 4, 2, {}, "Q5_1"),
    "gemma3-q8_0": ("Gemma3ForCausalLM", 4, 1, GEMMA, "Q8_0"),
}


@pytest.mark.parametrize("case", FILES)
def test_gguf_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, heads, kv_heads, overrides, kind = FILES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **{**SHAPE, **overrides})
    model = reference_model(folder)
    path = tmp_path / "model.gguf"
    write_gguf(model, path, gguf.GGMLQuantizationType[kind])

    sequences = run_mixed_steps(open_decoder(path))
    expected = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert expected[0].std() > 0.3
    assert worst_difference(sequences, expected) < TOLERANCE


@pytest.mark.parametrize("name", sorted(DEQUANTIZE))
def test_torch_blocks_equal_the_gguf_package(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (500, block_bytes), dtype=np.uint8)
    for start in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
        halves = rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    expected = gguf.dequantize(blocks, kind)
    assert torch.equal(DEQUANTIZE[name](torch.from_numpy(blocks)), torch.from_numpy(expected))


def test_every_type_the_gguf_package_dequantises_is_read(tmp_path: Path) -> None:
    """Random bytes in each of its formats give the numbers that it gives."""
    from shoal.model.gguf_source import GGUFSource

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    rng = np.random.default_rng(4)
    expected = {}
    for kind in gguf.GGMLQuantizationType:
        columns = 2 * gguf.GGML_QUANT_SIZES[kind][0]
        data = rng.integers(0, 64, gguf.quant_shape_to_byte_shape((3, columns), kind), np.uint8)
        try:
            expected[kind.name] = gguf.dequantize(data, kind)
        except NotImplementedError:
            continue
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    source = GGUFSource(tmp_path / "model.gguf")
    assert source.names == expected.keys() and len(expected) > 20
    for name, values in expected.items():
        assert source.shape(name) == values.shape
        np.testing.assert_array_equal(source.rows(name, 1, 3).float().numpy(), values[1:3])
        columns = Range(values.shape[1] // 2 - 1, values.shape[1])  # from inside a block
        some = source.rows(name, 1, 3, columns).float().numpy()
        np.testing.assert_array_equal(some, values[1:3, columns.start :])


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    seen: list[tuple[int, int]] = []
    load_decoder(
        folder,
        read_spec(folder),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        kernels=select("reference"),
        progress=lambda done, total: seen.append((done, total)),
    )
    done = [each for each, _ in seen]
    assert done == sorted(done) and len(done) > 3
    num_bytes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (num_bytes, num_bytes)


def test_large_tensors_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.model.fill._CHUNK_BYTES", 3000)
    model = reference_model(tiny_checkpoint(tmp_path, heads=4, kv_heads=2, **SHAPE))
    path = tmp_path / "model.gguf"
    write_gguf(model, path, F32)
    sequences = run_mixed_steps(open_decoder(path))
    expected = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert worst_difference(sequences, expected) < TOLERANCE


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(WeightsError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj"):
        open_decoder(folder)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(23, 72)}))
    with pytest.raises(WeightsError, match=r"k_proj\.weight has shape \[23, 72\].*\[24, 72\]"):
        open_decoder(folder)


def test_a_type_that_is_not_a_float_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(24, 72, dtype=torch.int8)}))
    with pytest.raises(WeightsError, match=r"k_proj\.weight has type I8"):
        open_decoder(folder)


def test_unused_tensors_are_told_and_known_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    known = {
        "lm_head.weight": torch.zeros(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1),
    }
    _rewrite(folder, lambda tensors: tensors.update(known))
    with caplog.at_level(logging.WARNING):
        open_decoder(folder)
    assert caplog.text == ""
    _rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)}))
    open_decoder(folder)
    assert "1 tensors are not used, model.extra.weight the first" in caplog.text


@pytest.mark.parametrize("kept", [0, 4, 200, 20_000])
def test_truncated_safetensors(kept: int, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read.*fetch it again"):
        open_decoder(folder)


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_gguf(cut: int, tmp_path: Path) -> None:
    model = reference_model(tiny_checkpoint(tmp_path, heads=4, kv_heads=2, **SHAPE))
    path = tmp_path / "model.gguf"
    write_gguf(model, path, F32)
    spec = read_spec(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(WeightsError, match="is truncated: it has"):
        load_decoder(
            path,
            spec,
            device=torch.device("cpu"),
            dtype=torch.float32,
            kernels=select("reference"),
        )


def test_unknown_gguf_tensor_type(tmp_path: Path) -> None:
    model = reference_model(tiny_checkpoint(tmp_path, heads=4, kv_heads=2, **SHAPE))
    path = tmp_path / "model.gguf"
    write_gguf(model, path, F32)
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    data[at : at + 4] = (9999).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=r"output_norm\.weight has tensor type number"):
        open_decoder(path)


def test_missing_shard_and_a_shard_elsewhere(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shard_size=50_000)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = listed["weight_map"]["model.norm.weight"]
    listed["weight_map"]["model.norm.weight"] = "../" + shard
    index.write_text(json.dumps(listed))
    with pytest.raises(WeightsError, match="shards must lie beside their index"):
        open_decoder(folder)
    listed["weight_map"]["model.norm.weight"] = "absent.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(WeightsError, match=r"absent\.safetensors cannot be read"):
        open_decoder(folder)


def test_of_a_tensor_in_two_shards_the_indexed_one_counts(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shard_size=50_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    name, last = "model.norm.weight", folder / max(index.values())
    path.write_text(json.dumps({"weight_map": {**index, name: min(index.values())}}))
    with pytest.raises(WeightsError, match=r"lacks model\.norm\.weight, which"):
        open_decoder(folder)
    path.write_text(json.dumps({"weight_map": index}))
    expected = run_mixed_steps(open_decoder(folder))
    name = next(each for each in index if index[each] != last.name and "layernorm" in each)
    tensors = {each: tensor.clone() for each, tensor in load_file(last).items()}
    save_file({**tensors, name: torch.zeros(72)}, last)
    for found, wanted in zip(run_mixed_steps(open_decoder(folder)), expected, strict=True):
        for position, logits in wanted.logits.items():
            assert torch.equal(found.logits[position], logits)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin, a pickle.*convert it to safe"):
        open_decoder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file"):
        open_decoder(folder)


def _rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
