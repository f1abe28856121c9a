"""Reading a ModelSpec: both spellings of config.json, GGUF headers, and what is refused."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.core.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from shoal.core.model_spec import LayerSpec, RopeSpec
from shoal.model.spec import read_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# As in google/gemma-3-4b-it: what equals transformers' defaults is missing.
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


def test_llama(tmp_path: Path) -> None:
    spec = read_spec(_folder(tmp_path, LLAMA))
    assert (spec.head_dim, spec.attention_scale) == (16, 0.25)
    assert spec.layers == (LayerSpec(rope=RopeSpec(theta=10_000.0)),) * 4
    assert (spec.num_kv_heads, spec.tied_embeddings, spec.qkv_bias) == (2, False, False)
    assert (spec.max_positions, spec.norm_eps, spec.eos_token_ids) == (512, 1e-5, (7,))


def test_num_key_value_heads_defaults_to_all_heads(tmp_path: Path) -> None:
    assert read_spec(_folder(tmp_path, {**LLAMA, "num_key_value_heads": None})).num_kv_heads == 4


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
    ],
)
def test_rope_in_every_spelling(spelling: dict[str, Any], tmp_path: Path) -> None:
    rope = RopeSpec(
        theta=5e5,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=128,
    )
    assert read_spec(_folder(tmp_path, {**LLAMA, **spelling})).layers[0].rope == rope


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    spec = read_spec(_folder(tmp_path, {**LLAMA, "rope_scaling": scaling}))
    assert spec.max_positions == 2048
    assert spec.layers[0].rope.attention_factor == pytest.approx(1.1386294)


def test_yarn_mscale(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}
    rope = read_spec(_folder(tmp_path, {**LLAMA, "rope_scaling": scaling})).layers[0].rope
    assert rope.original_max_positions == 512
    assert rope.attention_factor == pytest.approx(1.2772589 / 1.1386294)


def test_eos_ids_of_both_files_are_merged(tmp_path: Path) -> None:
    folder = _folder(tmp_path, LLAMA)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 8]}))
    assert read_spec(folder).eos_token_ids == (7, 9, 8)


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>"}])
def test_the_tokenizers_end_of_a_turn_counts_too(eos: Any, tmp_path: Path) -> None:
    """As in models tuned to chat whose config.json is their base model's."""
    folder = _folder(tmp_path, LLAMA)
    added = {"7": {"content": "</s>"}, "9": {"content": "<|im_end|>"}, "x": 5}
    config = {"eos_token": eos, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_spec(folder).eos_token_ids == (7, 9)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert read_spec(folder).eos_token_ids == (7,)


def test_qwen2_windows_begin_at_max_window_layers(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
    config["max_window_layers"] = 3
    assert {layer.window for layer in read_spec(_folder(tmp_path, config)).layers} == {None}
    config["use_sliding_window"] = True
    spec = read_spec(_folder(tmp_path, config))
    assert [layer.window for layer in spec.layers] == [None, None, None, 32]
    assert (spec.qkv_bias, spec.output_bias) == (True, False)


def test_mistral_window(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert read_spec(_folder(tmp_path, config)).layers[0].window == 4096
    config["sliding_window"] = None
    assert read_spec(_folder(tmp_path, config)).layers[0].window is None


def test_nested_gemma3(tmp_path: Path) -> None:
    spec = read_spec(_folder(tmp_path, GEMMA_4B))
    shapes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size, spec.hidden_size)
    assert shapes == (8, 4, 256, 262_208, 2560)
    local = LayerSpec(rope=RopeSpec(theta=10_000.0), window=1024)
    full = LayerSpec(rope=RopeSpec(theta=1e6, scaling="linear", factor=8.0))
    assert spec.layers[:12] == (local,) * 5 + (full,) + (local,) * 5 + (full,)
    assert spec.attention_scale == 256**-0.5
    assert (spec.tied_embeddings, spec.norm_plus_one, spec.post_norms) == (True, True, True)
    assert (spec.activation, spec.embedding_scale) == ("gelu_tanh", 2560**0.5)
    assert spec.eos_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM .*LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "names no architecture"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; shoal runs silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supp.*llama3"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"is_causal": False}, "is_causal is false; shoal runs causal models"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["chunked_attention"] * 4,
            },
            "layer_types has 'chunked_attention'",
        ),
    ],
)
def test_what_is_not_run_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_spec(_folder(tmp_path, {**LLAMA, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'; needed a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; needed a number above 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; needed a token id"),
        ({"layer_types": ["full_attention"]}, "needed a list of 4 names"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; needed true or false"),
        ({"hidden_size": math.inf}, "hidden_size is inf; needed a whole number"),
        ({"vocab_size": math.nan}, "vocab_size is nan; needed a whole number"),
        ({"vocab_size": 1e300}, r"vocab_size is 1e\+300; needed a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; needed at most 4096"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; needed a number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; needed a number above 0"),
        ({"rope_theta": 0}, "rope_theta is 0.*; needed a number above 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0.*needed a number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 0}}, "beta_slow is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": -1}}, "tion_factor is"),
        (
            {"rope_scaling": {"type": "llama3", **SCALING, "low_freq_factor": 4.0}},
            "high_freq_factor is 4.0; needed a number above 4",
        ),
        ({"text_config": "x"}, "text_config is no object"),
        ({"hidden_size": [7] * 10**6}, r"hidden_size is \[7, 7, 7, 7, 7, 7, \.\.\.\]; needed"),
    ],
)
def test_malformed_configs_name_the_key(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(_folder(tmp_path, {**LLAMA, **changes}))


def test_what_mixtral_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    del config["rms_norm_eps"], config["eos_token_id"]
    spec = read_spec(_folder(tmp_path, config))
    assert (spec.norm_eps, spec.layers[0].rope.theta) == (1e-5, 1e6)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist; needed a folder"):
        read_spec(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"config\.json does not exist"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_spec(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"neither a folder nor a \.gguf file"):
        read_spec(tmp_path / "config.json")


# --- GGUF ---

GEMMA_GGUF: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 12,
    "gemma3.context_length": 1024,
    "gemma3.embedding_length": 64,
    "gemma3.feed_forward_length": 96,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 32,
    "gemma3.attention.value_length": 32,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 64,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<end_of_turn>"],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
}


def test_gguf_gemma3(tmp_path: Path) -> None:
    spec = read_spec(_gguf(tmp_path, GEMMA_GGUF))
    local = LayerSpec(rope=RopeSpec(theta=10_000.0), window=64)
    full = LayerSpec(rope=RopeSpec(theta=1e6, scaling="linear", factor=8.0))
    assert spec.layers == ((local,) * 5 + (full,)) * 2
    assert (spec.head_dim, spec.attention_scale) == (32, 32**-0.5)
    assert (spec.vocab_size, spec.tied_embeddings, spec.norm_plus_one) == (4, True, False)
    assert spec.eos_token_ids == (1, 3), "the end of a turn is known by its text"


def test_gguf_gemma3_27b_has_its_own_attention_scale(tmp_path: Path) -> None:
    spec = read_spec(_gguf(tmp_path, {**GEMMA_GGUF, "gemma3.block_count": 62}))
    assert spec.attention_scale == 16**-0.5


def test_gguf_listed_windows(tmp_path: Path) -> None:
    pattern = [True, False] * 6
    metadata = {**GEMMA_GGUF, "gemma3.attention.sliding_window_pattern": pattern}
    spec = read_spec(_gguf(tmp_path, metadata))
    assert [layer.window for layer in spec.layers] == [64, None] * 6
    with pytest.raises(ModelError, match="lists 2 layers; needed 12"):
        metadata["gemma3.attention.sliding_window_pattern"] = [True, False]
        read_spec(_gguf(tmp_path, metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba' .*shoal runs llama, qwen2, qwen3, gemma3"),
        ({"gemma3.expert_count": 8}, "has 8 experts"),
        ({"gemma3.rope.dimension_count": 16}, "rope.dimension_count is 16 and heads have 32"),
        ({"gemma3.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"gemma3.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"split.count": 3}, "is one part of a split GGUF; .*llama-gguf-split --merge"),
    ],
)
def test_gguf_that_is_not_run_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_spec(_gguf(tmp_path, {**GEMMA_GGUF, **changes}))


@pytest.mark.parametrize("name", ["rope.scaling.factor", "rope.scale_linear"])
def test_gguf_from_before_there_were_kinds_of_scaling(name: str, tmp_path: Path) -> None:
    """llama.cpp takes a factor without a kind as linear, under its older name too."""
    kinds = ("gemma3.rope.scaling.type", "gemma3.rope.scaling.factor")
    metadata = {key: value for key, value in GEMMA_GGUF.items() if key not in kinds}
    spec = read_spec(_gguf(tmp_path, {**metadata, f"gemma3.{name}": 4.0}))
    assert spec.layers[5].rope == RopeSpec(theta=1e6, scaling="linear", factor=4.0)
    assert read_spec(_gguf(tmp_path, {**metadata, f"gemma3.{name}": 0.0})).layers[5].rope == (
        RopeSpec(theta=1e6)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_count", 2**31),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", -2.0),
        ("attention.layer_norm_rms_epsilon", float("nan")),
    ],
)
def test_gguf_whose_numbers_lie(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needed"):
        read_spec(_gguf(tmp_path, {**GEMMA_GGUF, f"gemma3.{name}": value}))


def test_gguf_without_a_needed_key(tmp_path: Path) -> None:
    metadata = {**GEMMA_GGUF}
    del metadata["gemma3.embedding_length"]
    with pytest.raises(ModelError, match=r"lacks gemma3\.embedding_length"):
        read_spec(_gguf(tmp_path, metadata))


def test_reading_a_spec_loads_no_torch() -> None:
    code = "import sys, shoal.model.spec; assert not {'torch', 'gguf'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def _folder(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _gguf(folder: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file of that metadata and one tensor, the embedding of four tokens."""
    embedding = _string("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 4, 0, 0)
    pairs = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(metadata)) + pairs + embedding
    path = folder / "model.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(4 * 64 * 4))
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: object) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<Id", 12, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case [bool(), *_]:
            return struct.pack("<IIQ", 9, 7, len(value)) + bytes(value)
    raise AssertionError(f"no GGUF type for {value!r}")
