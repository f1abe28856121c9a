"""The compiled CPU path against plain torch and transformers, on every instruction set here."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from checkpoints import reference_logits, reference_model, tiny_checkpoint
from paging import PagedRun, open_decoder, run_mixed_steps, worst_difference
from test_architectures import CASES

from shoal.core.errors import ConfigError
from shoal.core.options import EngineOptions
from shoal.kernels import select
from shoal.kernels.cpu import library
from shoal.kernels.cpu.arena import Arena, PackedFormat, PackedWeight, packed_bytes
from shoal.kernels.cpu.step import Session
from shoal.kernels.quantized import QuantizedWeight, WeightFormat, quantize
from shoal.model.allocation import packed_format
from shoal.model.draw import add_noise
from shoal.model.gguf_source import GGUFSource
from shoal.model.names import gguf_names
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.parameters import Placement
from shoal.model.precision import choose_formats
from shoal.model.spec import read_spec
from shoal.model.stow import stow
from shoal.worker.compute import choose_compute

TOLERANCE = 1e-3


def _sessions() -> dict[str, Session]:
    found = {}
    for isa in ("avx2", "avx512", "avx512_vnni", "avx512_bf16"):
        try:
            found[isa] = Session(2, isa)
        except OSError:
            continue  # this machine lacks it
    return found


SESSIONS = _sessions()
ISAS = sorted(SESSIONS)


def test_this_machine_runs_the_compiled_kernels() -> None:
    """A build that failed in silence would skip everything below."""
    assert "avx2" in SESSIONS
    assert Session(1).isa in SESSIONS


# --- whole models ---


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, isa: str, tmp_path: Path) -> None:
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    sequences = run_mixed_steps(open_decoder(folder, kernels=SESSIONS[isa]))
    model = reference_model(folder)
    expected = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert worst_difference(sequences, expected) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("case", ["smollm2", "gemma3"])
def test_kv_precision_is_that_of_the_reference(
    case: str, kv_dtype: torch.dtype, isa: str, tmp_path: Path
) -> None:
    """fp32 weights on both sides: what differs is where scores are rounded."""
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    exact = run_mixed_steps(open_decoder(folder))
    rounded = run_mixed_steps(open_decoder(folder, kernels=SESSIONS[isa]), kv_dtype=kv_dtype)
    for one, other in zip(exact, rounded, strict=True):
        for position, logits in one.logits.items():
            error = (logits - other.logits[position]).std() / logits.std()
            assert 0 < error < 0.08  # bf16 and int8 both keep about 8 bits


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_weight_precision_is_that_of_the_reference(weights: str, isa: str, tmp_path: Path) -> None:
    """The same rounded weights in both; the compiled path also rounds what it multiplies."""
    folder = tiny_checkpoint(tmp_path, "LlamaForCausalLM", 9, 3, hidden_size=288)
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    asked = "none" if weights == "bfloat16" else weights
    plain = open_decoder(folder, dtype, quantize=asked)
    packed = open_decoder(folder, dtype, kernels=SESSIONS[isa], quantize=asked)
    assert isinstance(packed, PackedDecoder)
    assert packed.precision == weights
    pairs = zip(run_mixed_steps(plain), run_mixed_steps(packed), strict=True)
    errors = [
        (logits - right.logits[position]).std() / logits.std()
        for left, right in pairs
        for position, logits in left.logits.items()
    ]
    # Random weights amplify what is rounded; measured: 0.02 (bfloat16) to 0.06.
    assert torch.stack(errors).mean() < 0.1


def test_a_row_does_not_depend_on_its_batch_or_the_threads(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "LlamaForCausalLM", 9, 3, hidden_size=288)
    for asked in ("none", "int8", "int4"):
        decoders = [
            open_decoder(folder, kernels=Session(threads), quantize=asked) for threads in (1, 2, 3)
        ]
        runs = [run_mixed_steps(decoder) for decoder in decoders]
        for others in runs[1:]:
            for one, other in zip(runs[0], others, strict=True):
                assert all(one.logits[at].equal(other.logits[at]) for at in one.logits)
        for one in runs[0]:  # and once more alone, token by token
            alone = PagedRun(decoders[1])
            again = alone.add(one.token_ids)
            for at in range(len(one.token_ids)):
                alone.step((again, at, at + 1))
            assert all(logits.equal(again.logits[at]) for at, logits in one.logits.items())
    session = Session(2)
    weight = _packed(session, "int8", quantize(torch.randn(70, 96), "int8"))
    x = torch.randn(29, 96)
    together = session.linear(x, weight)
    for row in range(len(x)):
        assert session.linear(x[row : row + 1], weight)[0].equal(together[row])


LONG = {
    "head_dim 34, groups of 2": (6, 3, {"head_dim": 34}),
    "head_dim 10, one KV head": (7, 1, {"head_dim": 10}),
    "5 KV heads, groups of 13": (65, 5, {"head_dim": 8}),
    "window": (9, 3, {"head_dim": 16, "sliding_window": 513}),
}


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LONG)
def test_long_contexts(case: str, isa: str, kv_dtype: torch.dtype, tmp_path: Path) -> None:
    """Past a chunk of 128 keys, and past 512, where a row of few tokens is cut in parts."""
    heads, kv_heads, overrides = LONG[case]
    architecture = "MistralForCausalLM" if "sliding_window" in overrides else "LlamaForCausalLM"
    folder = tiny_checkpoint(
        tmp_path, architecture, heads, kv_heads, max_position_embeddings=2048, **overrides
    )
    found = []
    for kernels in (None, SESSIONS[isa]):
        decoder = open_decoder(folder, kernels=kernels)
        run = PagedRun(decoder, 160, kv_dtype)
        ids = torch.randint(3, 90, (1330,), generator=torch.Generator().manual_seed(5)).tolist()
        sequence, other = run.add(ids), run.add(ids[:300])
        run.step((sequence, 0, 700), (other, 0, 298))
        run.step((other, 298, 299), (sequence, 700, 1320))
        for position in range(1320, 1326, 2):
            run.step((sequence, position, position + 2))
        run.step((sequence, 1326, 1327), (other, 299, 300))
        run.step((sequence, 1327, 1330))
        found.append([sequence.logits, other.logits])
    for one, another in zip(*found, strict=True):
        worst = max((one[at] - another[at]).abs().max() for at in one)
        assert worst < (2e-4 if kv_dtype == torch.float32 else 0.05)


# --- single products ---


def _packed(
    session: Session, kind: PackedFormat, rows: torch.Tensor | QuantizedWeight
) -> PackedWeight:
    num_rows, columns = rows.shape
    arena = Arena(session.native, packed_bytes(session.native, kind, num_rows, columns))
    weight = arena.take(kind, num_rows, columns)
    arena.put(weight, torch.arange(num_rows), rows)
    return weight


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """What int8 and int4 weights are multiplied with."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32))
    groups = padded.view(len(x), -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scale.clamp(min=1e-30)).round()
    return (codes * scale).view(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 12, 13, 40])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (17, 32), (50, 160), (3, 96)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "int4_min"])
def test_products(kind: PackedFormat, rows: int, columns: int, tokens: int, isa: str) -> None:
    session, generator = SESSIONS[isa], torch.Generator().manual_seed(rows + tokens)
    values = torch.randn(rows, columns, generator=generator) * 0.05
    x = torch.randn(tokens, columns, generator=generator) * 3
    source: torch.Tensor | QuantizedWeight = values
    if kind in ("int8", "int4", "int4_min"):
        weight_format: WeightFormat = "int8" if kind == "int8" else "int4"
        source = quantize(values, weight_format)
        if kind == "int4_min":
            shift = torch.randn(source.scales_FG.shape, generator=generator).half() * 0.1
            source = QuantizedWeight("int4", source.codes, source.scales_FG, shift)
        expected = _rounded(x) @ source.dequantize().T
    else:
        expected = x @ values.to(getattr(torch, kind)).float().T
    bound = 0.02 if isa == "avx512_bf16" and kind == "bfloat16" else 2e-5
    got = session.linear(x, _packed(session, kind, source))
    assert (got - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
def test_int8_products_at_their_largest(isa: str) -> None:
    """Sums of four products of extreme codes overflow 16 bits."""
    session = SESSIONS[isa]
    for sign in (1, -1):
        codes = torch.full((16, 64), 127 * sign, dtype=torch.int8)
        weight = QuantizedWeight("int8", codes, torch.ones(16, 2, dtype=torch.float16))
        x = torch.full((3, 64), -127.0)
        got = session.linear(x, _packed(session, "int8", weight))
        assert got.eq(-64 * 127 * 127 * sign).all()


@pytest.mark.parametrize("isa", ISAS)
def test_noise_is_that_of_the_reference(isa: str) -> None:
    seeds = [0, 1, 2**63 + 12345, 2**64 - 1]
    positions = [0, 7, 2**31 + 3, 2**40]
    for size in (1, 63, 64, 5003, 49152):
        expected, got = torch.zeros(4, size), torch.zeros(4, size)
        add_noise(expected, seeds, positions)
        SESSIONS[isa].add_noise(got, seeds, positions)
        assert (expected - got).abs().max() < 1e-5
        assert got.isfinite().all()


def test_zeros_and_nothing() -> None:
    session = Session(2)
    weight = _packed(session, "int4", quantize(torch.zeros(20, 64), "int4"))
    assert session.linear(torch.zeros(2, 64), weight).eq(0).all()
    assert session.linear(torch.randn(2, 64), weight).eq(0).all()


def test_formats_of_floats(tmp_path: Path) -> None:
    assert packed_format(None, torch.float32) == "float32"
    assert packed_format("fp8", torch.float32) == "bfloat16"  # holds e4m3 times a scale


def test_members_of_a_fused_weight_that_differ(tmp_path: Path) -> None:
    """q and k with minimums, v in eight bits, as files of mixed types have them."""
    parts = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "qwen2")
    for seed, part in enumerate(parts):
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).numpy()
        kind = (
            gguf.GGMLQuantizationType.Q8_0 if part == "attn_v" else gguf.GGMLQuantizationType.Q4_1
        )
        blocks = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"blk.0.{part}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "mixed.gguf")
    spec = replace(
        read_spec(tiny_checkpoint(tmp_path / "model")), architecture="qwen2", num_layers=1
    )
    for asked, wanted in (("int4", "int4_min"), ("auto", "int8"), ("int8", "int8"), ("none", None)):
        formats = choose_formats(spec, source, gguf_names(spec), asked)  # type: ignore[arg-type]
        assert formats.layers[0].qkv == wanted
        if wanted is None:
            continue
        session = Session(1)
        arena = Arena(session.native, packed_bytes(session.native, wanted, 64, 64))  # type: ignore[arg-type]
        target = arena.take(wanted, 64, 64)  # type: ignore[arg-type]
        name = "blk.0.attn_v.weight"
        stow(Placement(name, (64, 64), target, torch.arange(64)), 0, 64, source, arena)
        got = session.linear(torch.eye(64), target).T
        bound = 0.5 if wanted == "int4_min" else 0.02
        assert (got - source.rows(name, 0, 64)).abs().max() < bound


# --- where they are not ---


def test_without_the_library_torch_runs_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path))
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    compute = choose_compute(EngineOptions(model_path=""), spec, torch.device("cpu"))
    assert compute.kernels is select("reference")
    (record,) = caplog.records
    assert "install g++" in record.message
    with pytest.raises(ConfigError, match=r"--kernels cpu: .* not built"):
        choose_compute(EngineOptions(model_path="", kernels="cpu"), spec, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "cpu", "dtype": "float16"}, "no float16; use --dtype bfloat16"),
        ({"kernels": "cpu", "kv_cache_dtype": "fp8"}, "no fp8 KV; use --kv-cache-dtype int8"),
        ({"kernels": "cuda"}, "needs an NVIDIA GPU"),
        ({"quantize": "fp8"}, "fp8 needs a GPU"),
    ],
)
def test_what_the_cpu_cannot(options: dict[str, str], message: str, tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match=message):
        choose_compute(
            EngineOptions(model_path="", **options),
            spec,
            torch.device("cpu"),  # type: ignore[arg-type]
        )


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(OSError, match="no team of 2 threads for avx1024"):
        Session(2, "avx1024")


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_ABI", 99)
    with pytest.raises(OSError, match="another version of shoal: rebuild it"):
        Session(1)


def test_ids_are_64_bits_wide() -> None:
    """What the library reads as int64."""
    assert array("q").itemsize == 8
