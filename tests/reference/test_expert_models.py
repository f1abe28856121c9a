"""Models with experts: against transformers, and dealt to ranks against one rank."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import reference_logits, reference_model
from expert_models import MODELS, expert_checkpoint
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging import Paged, PagedRun, open_decoder, run_mixed_steps, worst_difference
from quantized_files import Writer, awq, gptq, write_quantized
from ranks import on_ranks, random_cut
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.comm import Group
from shoal.comm.in_process import in_process_groups
from shoal.core.errors import ModelError, UnsupportedModelError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import Quantization
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare, Range, Split, shards
from shoal.kernels import select
from shoal.kernels.reference_experts import route
from shoal.model.compressed_writer import write_compressed
from shoal.model.decoder import Decoder
from shoal.model.export_targets import choose_targets, quantization_config
from shoal.model.exports import folder_exports
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder

TOLERANCE = 1e-3
OF_ONE_RANK = 1e-4
WIDE = {"hidden_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = expert_checkpoint(tmp_path, name)
    assert _difference(folder, reference_model(folder)) < TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "qwen2-mixed"])
def test_experts_stacked_in_one_tensor(name: str, tmp_path: Path) -> None:
    """As transformers keeps them in memory, and some checkpoints on disk."""
    folder = expert_checkpoint(tmp_path, name)
    expected = _logits(run_mixed_steps(open_decoder(folder)))
    _stack_experts(folder)
    assert torch.equal(_logits(run_mixed_steps(open_decoder(folder))), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mixtral", "Q4_0"), ("qwen3", "F16"), ("qwen2", "Q8_0"), ("olmoe", "Q8_0")],
)
def test_gguf_equals_transformers(name: str, kind: str, tmp_path: Path) -> None:
    settings = {**WIDE, "norm_topk_prob": name == "qwen3"}
    model = reference_model(expert_checkpoint(tmp_path, name, **settings))
    path = tmp_path / "model.gguf"
    write_gguf(model, path, gguf.GGMLQuantizationType[kind])
    assert _difference(path, model) < TOLERANCE


@pytest.mark.parametrize(
    ("writer", "config"),
    [
        (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
        (gptq(8, 32), {"quant_method": "gptq", "bits": 8, "group_size": 32}),
    ],
)
def test_quantised_checkpoints(writer: Writer, config: dict[str, Any], tmp_path: Path) -> None:
    plain = expert_checkpoint(tmp_path / "plain", "qwen3", **WIDE)
    model = write_quantized(plain, tmp_path / "few-bits", writer, config)
    assert _difference(tmp_path / "few-bits", model) < TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_a_quantised_folder_holds_what_quantising_gives(name: str, tmp_path: Path) -> None:
    """As `shoal quantize` leaves it; the router stays as it is."""
    plain = expert_checkpoint(tmp_path / "plain", name, **WIDE)
    source = SafetensorsSource(plain)
    targets = choose_targets(
        folder_exports(read_spec(plain), source), "int8", 32, include_head=False
    )
    (folder := tmp_path / "int8").mkdir()
    write_compressed(folder, targets, lambda done, total: None)
    config = json.loads((plain / "config.json").read_text())
    said = {**config, "quantization_config": quantization_config(targets)}
    (folder / "config.json").write_text(json.dumps(said))
    kept = {each.export.name for each in targets if each.format is None}
    assert any("router" in each or each.endswith(".gate.weight") for each in kept)
    assert not any(".experts." in each for each in kept)
    written = open_decoder(folder, quantize="auto")
    asked = _whole_logits(plain, "int8")
    assert written.precision == "int8"
    # Embeddings are rounded to 16 bits, and now and then a token goes to another expert for it.
    assert (_logits(run_mixed_steps(written)) - asked).abs().median() < 0.02


@given(name=st.sampled_from(sorted(MODELS)), size=st.integers(1, 4), seed=st.integers(0, 9999))
@settings(
    max_examples=14, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_dealing_computes_the_same(
    name: str, size: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, rng = (
        expert_checkpoint(tmp_path_factory.mktemp(name), name, seed=seed),
        random.Random(seed),
    )
    expected, split = _whole_logits(path), _random_split(read_spec(path), size, rng)
    assert (_dealt_logits(path, split) - expected).abs().max() < OF_ONE_RANK, split


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_experts_in_any_dealing(quantize: Quantization, tmp_path: Path) -> None:
    path = expert_checkpoint(tmp_path, "qwen2", **{**WIDE, "moe_intermediate_size": 64})
    expected = _whole_logits(path, quantize)
    exact = _whole_logits(path)
    assert (expected - exact).abs().max() > 0
    split = _random_split(read_spec(path), 3, random.Random(quantize))
    assert (_dealt_logits(path, split, quantize) - expected).abs().max() < OF_ONE_RANK


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_dealt_anew_between_steps(quantize: Quantization, tmp_path: Path) -> None:
    """Ranks swap their experts half-way; what was cached stays, and tokens are counted on."""
    path = expert_checkpoint(tmp_path, "qwen3", **WIDE)
    spec, rng = read_spec(path), random.Random(3)
    before = _random_split(spec, 2, rng)
    after = [_random_dealing(spec, 2, rng) for _ in range(spec.num_layers)]

    def on_rank(rank: int, group: Group) -> tuple[Tensor, Tensor]:
        decoder = _decoder(path, before, rank, group, quantize)
        run = PagedRun(decoder)
        row = run.add(list(range(3, 35)))
        run.step((row, 0, 20))
        for layer, dealing in enumerate(after):
            decoder.deal(layer, decoder.load_experts(layer, dealing[rank]), dealing)
        run.step((row, 20, 32))
        assert decoder.expert_counts is not None
        return _logits([row]), decoder.expert_counts

    decoder = _decoder(path, None, 0, None, quantize)
    run = PagedRun(decoder)
    row = run.add(list(range(3, 35)))
    run.step((row, 0, 20))
    run.step((row, 20, 32))
    parts = on_ranks(2, on_rank)
    logits = torch.cat([each for each, _ in parts], -1)
    assert (logits - _logits([row])).abs().max() < OF_ONE_RANK
    assert spec.experts is not None
    for _, counts in parts:
        assert torch.equal(counts, decoder.expert_counts)
        assert counts.sum(-1).tolist() == [32 * spec.experts.num_active] * spec.num_layers


def test_each_rank_reads_its_own_experts_alone(tmp_path: Path) -> None:
    path = expert_checkpoint(tmp_path, "mixtral")
    spec = read_spec(path)
    two: Dealing = ((ExpertShare(0), ExpertShare(3, 0, 7)), ())
    none: Dealing = ((), ())
    some, nothing = (
        _decoder(path, _split(spec, 2, (dealing,)), 0, in_process_groups(2)[0], "none")
        for dealing in (two, none)
    )
    of_expert = 3 * spec.ffn_size * spec.hidden_size * 4
    assert some.weight_bytes - nothing.weight_bytes == spec.num_layers * 2 * of_expert


def test_equal_scores_choose_the_first_expert() -> None:
    ids, weights = route(
        torch.ones(2, 4),
        torch.zeros(6, 4),
        num_active=3,
        renormalises=False,
        scale=2.0,
        num_groups=3,
        num_active_groups=2,
    )
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 2 / 6))


@pytest.mark.parametrize(
    ("name", "key", "value", "error"),
    [
        ("olmoe", "clip_qkv", 8.0, UnsupportedModelError),
        ("deepseek", "topk_method", "noaux_tc", UnsupportedModelError),
        ("deepseek", "scoring_func", "sigmoid", UnsupportedModelError),
        ("deepseek", "v_head_dim", 24, UnsupportedModelError),
        ("deepseek-groups", "n_group", 3, ModelError),
        ("qwen3", "num_experts_per_tok", 8, ModelError),
    ],
)
def test_refuses_by_name(
    name: str, key: str, value: object, error: type[Exception], tmp_path: Path
) -> None:
    path = expert_checkpoint(tmp_path, name) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(error, match="n_group|8 experts in 3" if key == "n_group" else key):
        read_spec(tmp_path)


def _difference(path: Path, model: Any) -> float:
    sequences = run_mixed_steps(open_decoder(path))
    expected = [reference_logits(model, each.token_ids) for each in sequences]
    return worst_difference(sequences, expected)


def _logits(sequences: list[Paged]) -> Tensor:
    return torch.stack([each for one in sequences for _, each in sorted(one.logits.items())])


def _whole_logits(path: Path, quantize: Quantization = "none") -> Tensor:
    return _logits(run_mixed_steps(_decoder(path, None, 0, None, quantize)))


def _dealt_logits(path: Path, split: Split, quantize: Quantization = "none") -> Tensor:
    def on_rank(rank: int, group: Group) -> Tensor:
        return _logits(run_mixed_steps(_decoder(path, split, rank, group, quantize)))

    return torch.cat(on_ranks(split.num_ranks, on_rank), -1)


def _decoder(
    path: Path, split: Split | None, rank: int, group: Group | None, quantize: Quantization
) -> Decoder:
    spec, shard = read_spec(path), None
    if split is not None:
        layers = Range(0, spec.num_layers)
        shard = shards(split, layers, has_embedding=True, has_head=True)[rank]
    decoder = load_decoder(
        path,
        spec,
        shard=shard,
        group=group,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=select("reference"),
        quantize=quantize,
    )
    assert isinstance(decoder, Decoder)
    return decoder


def _random_split(spec: ModelSpec, size: int, rng: random.Random) -> Split:
    """Heads and columns of any sizes, experts in any order, replicas among them."""
    heads, ffn = (random_cut(total, size, rng) for total in (spec.num_heads, spec.ffn_size))
    dealings = tuple(_random_dealing(spec, size, rng) for _ in range(spec.num_layers))
    if rng.random() < 0.3:
        dealings = dealings[:1]
    return _split(spec, size, dealings, heads, ffn)


def _split(
    spec: ModelSpec,
    size: int,
    dealings: tuple[Dealing, ...],
    heads: tuple[Range, ...] | None = None,
    ffn: tuple[Range, ...] | None = None,
) -> Split:
    """Every rank has some of the vocabulary, and so hidden states."""
    edges = [spec.vocab_size * rank // size for rank in range(size + 1)]
    rest = (Range(0, 0),) * (size - 1)
    return Split(
        heads=heads or (Range(0, spec.num_heads), *_ends(rest, spec.num_heads)),
        ffn=ffn or (Range(0, spec.ffn_size), *_ends(rest, spec.ffn_size)),
        vocab=tuple(Range(*each) for each in itertools.pairwise(edges)),
        experts=dealings,
    )


def _ends(ranges: tuple[Range, ...], total: int) -> tuple[Range, ...]:
    return tuple(Range(total, total) for _ in ranges)


def _random_dealing(spec: ModelSpec, size: int, rng: random.Random) -> Dealing:
    assert spec.experts is not None
    ranks: list[list[ExpertShare]] = [[] for _ in range(size)]
    for expert in range(spec.experts.num_experts):
        holders = rng.sample(range(size), rng.randint(1, min(size, 3)) if rng.random() < 0.4 else 1)
        cuts = sorted(rng.sample(range(1, WHOLE_SHARE), len(holders) - 1))
        edges = [0, *cuts, WHOLE_SHARE]
        for holder, (start, stop) in zip(holders, itertools.pairwise(edges), strict=True):
            ranks[holder].append(ExpertShare(expert, start, stop))
    return tuple(map(tuple, ranks))


def _stack_experts(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    renamed = {_stacked_name(name): tensor for name, tensor in tensors.items()}
    layers = {name.split(".experts.")[0] for name in renamed if ".experts." in name}
    for layer in layers:
        found = {
            tuple(name.removeprefix(f"{layer}.experts.").split(".")[:2]): renamed.pop(name)
            for name in list(renamed)
            if name.startswith(f"{layer}.experts.")
        }
        numbers = range(len(found) // 3)
        gate_up = [torch.cat([found[str(n), f"{p}_proj"] for p in ("gate", "up")]) for n in numbers]
        renamed[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
        downs = [found[str(number), "down_proj"] for number in numbers]
        renamed[f"{layer}.experts.down_proj"] = torch.stack(downs)
    save_file(renamed, path)


def _stacked_name(name: str) -> str:
    for old, new in (("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w3", "up_proj")):
        name = name.replace(f".{old}.", f".{new}.")
    return name.replace(".w2.", ".down_proj.")
