"""A decoder in shards against the whole: any split, any stages, any precision, the same logits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import VOCAB_SIZE, reference_model, tiny_checkpoint
from gguf_files import write_gguf
from paging import NUM_BLOCKS, Paged, run_mixed_steps
from quantized_files import Writer, awq, fp8, gptq, write_quantized
from ranks import on_ranks, random_cut
from torch import Tensor

from shoal.comm import Group
from shoal.core.errors import WeightsError
from shoal.core.options import Quantization
from shoal.core.split import Range, Shard, Split, shards, whole
from shoal.kernels import KernelSet, KVCache, RaggedBatch, select
from shoal.kernels.cpu.step import Session
from shoal.model import weights
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.parameters import DecoderParameters
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.kv_pool import allocate

CPU = torch.device("cpu")
FP8_BLOCKS = {"weight_block_size": [128, 128]}
TOLERANCE = 1e-4
LAYERS = 3

Case = tuple[str, int, int, dict[str, Any]]
SANDWICH: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "final_logit_softcapping": 3.0,
}
CASES: dict[str, Case] = {
    "9-3-tied": ("LlamaForCausalLM", 9, 3, {"tie_word_embeddings": True}),
    "9-3-biases": ("LlamaForCausalLM", 9, 3, {"attention_bias": True, "mlp_bias": True}),
    "14-2-qkv-bias": ("Qwen2ForCausalLM", 14, 2, {}),
    "32-8-qk-norm": ("Qwen3ForCausalLM", 32, 8, {"hidden_size": 64}),
    "8-8-post-norms": ("Gemma3ForCausalLM", 8, 8, {**SANDWICH, "tie_word_embeddings": True}),
    "8-8-untied": ("Gemma3ForCausalLM", 8, 8, SANDWICH),
}


def random_split(spec: Any, size: int, rng: random.Random) -> Split:
    """Ranges that need not resemble each other; often empty."""
    return Split(
        heads=random_cut(spec.num_heads, size, rng),
        ffn=random_cut(spec.ffn_size, size, rng),
        vocab=random_cut(spec.vocab_size, size, rng),
    )


def all_logits(sequences: list[Paged]) -> Tensor:
    return torch.stack([each for one in sequences for _, each in sorted(one.logits.items())])


def sharded_logits(
    path: Path,
    split: Split,
    kernels: Callable[[], KernelSet | Session] = lambda: select("reference"),
    quantize: Quantization = "none",
) -> Tensor:
    """Every rank runs the same steps; their logits side by side."""
    spec = read_spec(path)
    held = shards(split, Range(0, spec.num_layers), has_embedding=True, has_head=True)

    def on_rank(rank: int, group: Group) -> Tensor:
        decoder = load_decoder(
            path,
            spec,
            shard=held[rank],
            group=group,
            device=CPU,
            dtype=torch.float32,
            kernels=kernels(),
            quantize=quantize,
        )
        return all_logits(run_mixed_steps(decoder))

    return torch.cat(on_ranks(split.num_ranks, on_rank), -1)


def whole_logits(
    path: Path,
    kernels: KernelSet | Session | None = None,
    quantize: Quantization = "none",
) -> Tensor:
    decoder = load_decoder(
        path,
        read_spec(path),
        device=CPU,
        dtype=torch.float32,
        kernels=kernels or select("reference"),
        quantize=quantize,
    )
    return all_logits(run_mixed_steps(decoder))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_random_splits(case: str, tmp_path: Path) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    path = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    expected, rng = whole_logits(path), random.Random(case)
    for size in (1, 2, 3, 4):
        split = random_split(read_spec(path), size, rng)
        assert (sharded_logits(path, split) - expected).abs().max() < TOLERANCE, split


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 16), (8, 2, 16), (9, 3, 32)])
def test_codes_are_those_of_the_whole(
    heads: int, kv_heads: int, head_dim: int, quantize: Quantization, tmp_path: Path
) -> None:
    """Heads cut inside a group of 32, FFN columns snapped to whole ones."""
    path = tiny_checkpoint(
        tmp_path, "LlamaForCausalLM", heads, kv_heads, head_dim=head_dim, intermediate_size=224
    )
    expected, rng = whole_logits(path, quantize=quantize), random.Random(heads)
    for size in (2, 4):
        split = random_split(read_spec(path), size, rng)
        got = sharded_logits(path, split, quantize=quantize)
        assert (got - expected).abs().max() < TOLERANCE, split


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1", "F16"])
def test_gguf_blocks_are_read_in_part(kind: str, tmp_path: Path) -> None:
    """llama's q and k rows are in another order there."""
    path = gguf_checkpoint(tmp_path, kind)
    expected = whole_logits(path, quantize="auto")
    for split in (random_split(read_spec(path), 3, random.Random(kind)), INSIDE_BLOCKS):
        got = sharded_logits(path, split, quantize="auto")
        assert (got - expected).abs().max() < TOLERANCE


INSIDE_BLOCKS = Split(
    heads=(Range(0, 5), Range(5, 8)),
    ffn=(Range(0, 20), Range(20, 160)),
    vocab=(Range(0, 128), Range(128, 128)),
)


def gguf_checkpoint(folder: Path, kind: str) -> Path:
    shape: dict[str, int] = {"heads": 8, "kv_heads": 2, "head_dim": 16, "intermediate_size": 160}
    model = reference_model(tiny_checkpoint(folder, **shape))  # type: ignore[arg-type]
    write_gguf(model, folder / "model.gguf", gguf.GGMLQuantizationType[kind])
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("writer", "config"),
    [
        (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32}),
        (gptq(4, 32), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (gptq(4, 32, permuted=True), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (fp8(None, "weight_scale", dims=0), {"quant_method": "fp8"}),
        (fp8((128, 128), "weight_scale_inv"), {**FP8_BLOCKS, "quant_method": "fp8"}),
    ],
)
def test_quantised_folders(writer: Writer, config: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_checkpoint(
        tmp_path / "plain", heads=8, kv_heads=2, head_dim=32, intermediate_size=256
    )
    path = tmp_path / "quantized"
    write_quantized(plain, path, writer, config)
    expected = whole_logits(path, quantize="auto")
    for size in (2, 3):
        split = random_split(read_spec(path), size, random.Random(size))
        got = sharded_logits(path, split, quantize="auto")
        assert (got - expected).abs().max() < TOLERANCE, split


# ---- packed weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [("Q4_0", "auto"), ("Q4_1", "auto"), ("Q8_0", "auto"), ("F16", "int4"), ("F16", "none")],
)
def test_packed_weights_are_ranges_of_the_whole(
    kind: str, quantize: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number by number: activations rounded to int8 would hide what logits could show."""
    monkeypatch.setattr(
        weights, "PackedDecoder", lambda _, parameters, *__, **held: (parameters, held)
    )
    path, session = gguf_checkpoint(tmp_path, kind), Session(1)
    spec = read_spec(path)
    dim, hidden = spec.head_dim, spec.hidden_size

    def load(shard: Shard) -> tuple[DecoderParameters, Shard]:
        loaded: Any = load_decoder(
            path,
            spec,
            shard=shard,
            device=CPU,
            dtype=torch.float32,
            kernels=session,
            quantize=quantize,
        )
        return loaded[0], loaded[1]["shard"]

    def numbers(weight: Any) -> Tensor:
        return session.linear(torch.eye(weight.cols), weight).T

    def gate_up(weight: Any, ffn: int) -> Tensor:
        """[2, F, E]: panels of 16 rows of both in turn."""
        return (
            numbers(weight).view(-1, 2, 16, hidden).transpose(0, 1).reshape(2, -1, hidden)[:, :ffn]
        )

    all_of_it = load(whole(spec))[0].layers[1]
    q, k, v = numbers(all_of_it.qkv_CE).view(-1, dim, hidden).split([8, 2, 2])
    o, down = numbers(all_of_it.o_EC), numbers(all_of_it.down_EF)
    gates = gate_up(all_of_it.gate_up_FE, spec.ffn_size)
    for shard in shards(INSIDE_BLOCKS, Range(1, 2), has_embedding=True, has_head=True):
        parameters, held = load(shard)
        layer, kv = parameters.layers[0], shard.kv_heads(spec)
        heads, ffn = (
            slice(shard.heads.start, shard.heads.stop),
            slice(held.ffn.start, held.ffn.stop),
        )
        kv_heads = slice(kv.start, kv.stop)
        expected = torch.cat((q[heads], k[kv_heads], v[kv_heads])).flatten(0, 1)
        assert torch.equal(numbers(layer.qkv_CE), expected)
        columns = Range(shard.heads.start * dim, shard.heads.stop * dim)
        columns = columns if quantize == "none" else columns.snapped(32)
        assert torch.equal(numbers(layer.o_EC), o[:, columns.start : columns.stop])
        assert torch.equal(gate_up(layer.gate_up_FE, len(held.ffn)), gates[:, ffn])
        assert torch.equal(numbers(layer.down_EF), down[:, ffn])
        assert held.ffn == shard.ffn if quantize == "none" else held.ffn.start in (0, 32)


def test_packed_shards_compute_what_the_whole_does(tmp_path: Path) -> None:
    """Their kernels have tests of their own; here, that what is loaded for them fits."""
    path = tiny_checkpoint(
        tmp_path, "Qwen3ForCausalLM", 14, 2, head_dim=16, hidden_size=64, attention_bias=True
    )
    expected, spec = whole_logits(path, Session(1)), read_spec(path)
    for size in (2, 3):
        split = random_split(spec, size, random.Random(size))
        got = sharded_logits(path, split, lambda: Session(1))
        assert (got - expected).abs().max() < TOLERANCE


# ---- stages ----------------------------------------------------------------------------------


class Chain:
    """Stages one after the other, as one decoder; each has its KV to itself."""

    def __init__(self, decoders: list[Decoder], hops: list[Range]) -> None:
        self.spec, self.device, self.dtype = decoders[0].spec, CPU, torch.float32
        self.shard = whole(self.spec)
        self._stages = list(zip(decoders, hops, strict=True))
        self._kv = [
            allocate(self.spec, each.shard, NUM_BLOCKS, torch.float32, CPU).cache
            for each in decoders
        ]

    def forward(self, token_ids_T: Tensor, batch: RaggedBatch, _kv: KVCache) -> Tensor:
        hidden = token_ids_T
        for (decoder, layers), kv in zip(self._stages, self._kv, strict=True):
            hidden = decoder.forward(hidden, batch, kv, layers)
        return hidden

    def logits(self, hidden_NE: Tensor) -> Tensor:
        return self._stages[-1][0].logits(hidden_NE)


@pytest.mark.parametrize("case", ["9-3-tied", "8-8-untied", "14-2-qkv-bias"])
@pytest.mark.parametrize(
    ("held", "hops"),
    [
        ([(0, 1), (1, 3)], [(0, 1), (1, 3)]),
        ([(0, 2), (1, 3)], [(0, 1), (1, 3)]),
        ([(0, 2), (1, 3)], [(0, 2), (2, 3)]),
        ([(0, 0), (0, 3), (3, 3)], [(0, 0), (0, 3), (3, 3)]),
        ([(0, 3), (2, 3)], [(0, 3), (3, 3)]),
    ],
)
def test_stages_that_overlap_and_stages_without_layers(
    case: str, held: list[tuple[int, int]], hops: list[tuple[int, int]], tmp_path: Path
) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    path = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    spec, rng = read_spec(path), random.Random(7)
    split = random_split(spec, 2, rng)

    def on_rank(rank: int, group: Group) -> Tensor:
        decoders = []
        for stage, layers in enumerate(held):
            shard = shards(
                split,
                Range(*layers),
                has_embedding=stage == 0,
                has_head=stage == len(held) - 1,
            )[rank]
            decoder = load_decoder(
                path,
                spec,
                shard=shard,
                group=group,
                device=CPU,
                dtype=torch.float32,
                kernels=select("reference"),
            )
            assert isinstance(decoder, Decoder)
            decoders.append(decoder)
        chain: Any = Chain(decoders, [Range(*layers) for layers in hops])
        return all_logits(run_mixed_steps(chain))

    got = torch.cat(on_ranks(2, on_rank), -1)
    assert (got - whole_logits(path)).abs().max() < TOLERANCE


# ---- what is held and what is read -----------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_without_anything_holds_nothing(packed: bool, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "LlamaForCausalLM", 9, 3, attention_bias=True)
    spec = read_spec(path)
    none = Range(0, 0)
    shard = Shard(
        layers=Range(1, 2), heads=none, ffn=none, vocab=none, is_first=False, has_embedding=False
    )
    kernels = Session(1) if packed else select("reference")
    decoder = load_decoder(
        path, spec, shard=shard, device=CPU, dtype=torch.float32, kernels=kernels
    )
    assert decoder.weight_bytes == 3 * spec.hidden_size * 4  # its norms
    assert decoder.logits(torch.ones(5, spec.hidden_size)).shape == (5, 0)


def test_a_shard_needs_the_whole_checkpoint_to_be_sound(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    spec = read_spec(path)
    last = replace(whole(spec), layers=Range(2, 3), has_embedding=False)
    with pytest.raises(WeightsError, match=r"layers\.3\..* fetch the model again"):
        load_decoder(
            path,
            replace(spec, num_layers=4, layers=(*spec.layers, spec.layers[0])),
            shard=last,
            device=CPU,
            dtype=torch.float32,
            kernels=select("reference"),
        )


def test_a_tied_table_is_one_only_where_both_ends_are(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    spec = read_spec(path)
    table = VOCAB_SIZE * spec.hidden_size * 4

    def weight_bytes(**ends: bool) -> int:
        decoder = load_decoder(
            path,
            spec,
            shard=replace(whole(spec), layers=Range(1, 1), **ends),
            device=CPU,
            dtype=torch.float32,
            kernels=select("reference"),
        )
        return decoder.weight_bytes

    norm = spec.hidden_size * 4
    assert weight_bytes(has_head=False) == table
    assert weight_bytes(has_embedding=False) == table + norm
    assert weight_bytes() == table + norm


@pytest.mark.parametrize("packed", [False, True])
def test_only_its_own_ranges_of_the_file_are_read(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(
        tmp_path,
        heads=8,
        kv_heads=8,
        head_dim=128,
        intermediate_size=8192,
        num_hidden_layers=2,
        vocab_size=8192,
    )
    kept: list[SafetensorsSource] = []  # its memory map lives as long as it

    def source(folder: Path) -> SafetensorsSource:
        kept.append(SafetensorsSource(folder))
        return kept[0]

    monkeypatch.setattr(weights, "SafetensorsSource", source)
    spec = read_spec(path)
    shard = Shard(
        layers=Range(1, 2),
        heads=Range(6, 8),
        ffn=Range(6144, 8192),
        vocab=Range(0, 2048),
        has_embedding=False,
        num_ranks=1,
    )
    decoder = load_decoder(
        path,
        spec,
        shard=shard,
        device=CPU,
        dtype=torch.float32,
        kernels=Session(1) if packed else select("reference"),
    )
    mapped = _mapped_bytes(path / "model.safetensors")
    # Of o and down it wants columns, and the system maps 64 KiB around what is touched.
    in_columns = (spec.hidden_size**2 + spec.hidden_size * spec.ffn_size) * 4
    assert 0.9 * decoder.weight_bytes < mapped < 1.1 * decoder.weight_bytes + in_columns
    assert mapped < (path / "model.safetensors").stat().st_size / 4


def _mapped_bytes(path: Path) -> int:
    """Bytes of a file that this process has touched through its memory maps."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_packed_decoder_is_what_loads(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    decoder = load_decoder(
        path, read_spec(path), device=CPU, dtype=torch.float32, kernels=Session(1)
    )
    assert isinstance(decoder, PackedDecoder)
    assert decoder.shard == whole(read_spec(path))
