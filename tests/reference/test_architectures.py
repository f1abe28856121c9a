"""Every architecture against transformers: fp32 logits of ragged, chunked, paged steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import reference_logits, reference_model, tiny_checkpoint
from paging import open_decoder, run_mixed_steps, worst_difference

from shoal.kernels import attention_plan, select

TOLERANCE = 1e-3

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

Case = tuple[str, int, int, dict[str, Any]]
CASES: dict[str, Case] = {
    "smollm2": ("LlamaForCausalLM", 9, 3, {"tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", 32, 8, {}),
    "llama-llama3": ("LlamaForCausalLM", 8, 8, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear": ("LlamaForCausalLM", 14, 2, {"rope_parameters": LINEAR}),
    "llama-biases": ("LlamaForCausalLM", 9, 3, {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", 9, 3, {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", 32, 8, {"sliding_window": 11}),
    "qwen2": ("Qwen2ForCausalLM", 14, 2, {}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        8,
        8,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2ForCausalLM", 9, 3, {"rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", 32, 8, {"hidden_size": 64}),
    "qwen3-yarn": (
        "Qwen3ForCausalLM",
        14,
        2,
        {"rope_parameters": {**YARN, "attention_factor": 0.8, "beta_fast": 8.0}, "head_dim": 16},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        8,
        8,
        {
            "sliding_window": 6,
            "layer_types": GEMMA_LAYERS,
            "rope_parameters": GEMMA_ROPES,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-softcap": (
        "Gemma3ForCausalLM",
        8,
        2,
        {
            "sliding_window": 6,
            "layer_types": GEMMA_LAYERS,
            "final_logit_softcapping": 3.0,
            "head_dim": 16,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    assert _difference(folder) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_logits_on_the_gpu_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    assert _difference(folder, "cuda") < TOLERANCE


@pytest.mark.parametrize("case", ["smollm2", "mistral-window"])
def test_score_rectangles_of_any_size_give_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    monkeypatch.setattr(attention_plan, "MAX_SCORES", heads * 100)
    monkeypatch.setattr(attention_plan, "_SHORT_CONTEXT", 0)
    assert _difference(folder) < TOLERANCE


def test_attention_softcap(tmp_path: Path) -> None:
    """No architecture run today has one; transformers' attention takes it as an argument."""
    architecture, heads, kv_heads, overrides = CASES["gemma3"]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    sequences = run_mixed_steps(open_decoder(folder, attention_softcap=0.5))
    model = reference_model(folder)
    plain, capped = (
        [reference_logits(model, sequence.token_ids, **cap) for sequence in sequences]
        for cap in ({}, {"softcap": 0.5})
    )
    assert worst_difference(sequences, capped) < TOLERANCE < worst_difference(sequences, plain)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shard_size=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert _difference(folder) < TOLERANCE


@pytest.mark.parametrize("case", ["smollm2", "gemma3"])
def test_bfloat16_is_close(case: str, tmp_path: Path) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    exact = run_mixed_steps(open_decoder(folder))
    rounded = run_mixed_steps(open_decoder(folder, torch.bfloat16))
    for one, other in zip(exact, rounded, strict=True):
        for position, logits in one.logits.items():
            assert other.logits[position].dtype == torch.float32
            similarity = torch.cosine_similarity(logits, other.logits[position], dim=0)
            assert similarity > 0.99


def test_an_unknown_kernel_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'warp' does not exist; choose one of \['cuda',"):
        select("warp")


def _difference(folder: Path, device: str = "cpu") -> float:
    sequences = run_mixed_steps(open_decoder(folder, device=device))
    model = reference_model(folder)
    expected = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert expected[0].std() > 0.3, "logits too flat for the comparison to mean anything"
    return worst_difference(sequences, expected)
