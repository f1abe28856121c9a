"""`shoal quantize`: what it writes is what `quantize` makes, whatever it is made from."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from checkpoints import reference_logits, reference_model, tiny_checkpoint
from gguf_files import write_gguf
from paging import run_mixed_steps, worst_difference
from safetensors.torch import load_file

from shoal.cli.main import main
from shoal.kernels import select
from shoal.kernels.quantized import quantize
from shoal.model import compressed_writer, safetensors_writer
from shoal.model.export_targets import choose_targets, quantization_config
from shoal.model.exports import gguf_exports
from shoal.model.gguf_source import GGUFSource
from shoal.model.hf_config import check_read_back, hf_config
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.text.tokenizer import load_tokenizer

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
F32 = gguf.GGMLQuantizationType.F32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
GEMMA = {
    "num_hidden_layers": 7,
    "sliding_window": 6,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `shoal quantize ARGS` in this process; (exit code, stdout, stderr)."""

    def run(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", "quantize", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_checkpoint(folder, heads=4, kv_heads=2, num_hidden_layers=2, **SHAPE)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "LICENSE.txt").write_text("free")
    (folder / "training.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("format_", ["int8", "int4", "fp8"])
def test_the_folder_holds_what_quantize_makes(
    format_: Any, plain: Path, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "new" / "out"
    code, out, err = run(plain, "-o", output, "--format", format_)
    assert (code, err) == (0, "")
    assert "of projections" in out and "--include-head" in out

    source, ours = SafetensorsSource(plain), SafetensorsSource(output)
    assert ours.names == source.names
    for name in source.names:
        rows = source.rows(name, 0, source.shape(name)[0])
        if "_proj" not in name:
            assert ours.format(name) is None
            assert torch.equal(ours.rows(name, 0, len(rows)).float(), _sixteen_bits(rows))
            continue
        expected = quantize(rows, format_)
        assert ours.format(name) == format_
        got = ours.quantized_rows(name, 0, len(rows))
        assert torch.equal(got.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(got.scales_FG, expected.scales_FG)
        assert got.minimums_FG is None
    assert sorted(path.name for path in output.iterdir()) == [
        "LICENSE.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("format_", ["int8", "int4", "fp8"])
def test_logits_are_those_of_the_written_weights(
    format_: str, plain: Path, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "out"
    assert run(plain, "-o", output, "--format", format_)[0] == 0
    model, ours = reference_model(plain), SafetensorsSource(output)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours.rows(name, 0, len(parameter)))
    sequences = run_mixed_steps(_decoder(output, plain))
    expected = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert worst_difference(sequences, expected) < 1e-3


def test_the_stored_tensors_are_compressed_tensors_own(
    plain: Path, tmp_path: Path, run: Run
) -> None:
    """Read by hand, as its documentation says: words of 32 bits, code + 8, low bits first."""
    output = tmp_path / "out"
    assert run(plain, "-o", output, "--format", "int4", "--group-size", "16")[0] == 0
    tensors = load_file(output / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    words, scales = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    assert (words.dtype, scales.dtype) == (torch.int32, torch.float16)
    values = torch.empty(rows, columns)
    for column in range(columns):
        code = (words[:, column // 8].long() >> (4 * (column % 8))) % 16 - 8
        values[:, column] = code * scales[:, column // 16].float()
    weight = load_file(plain / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(values, quantize(weight, "int4", 16).dequantize())
    assert (values - weight).pow(2).sum() < 0.01 * weight.pow(2).sum()

    config = json.loads((output / "config.json").read_text())
    said = config.pop("quantization_config")
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    assert said["ignore"] == ["lm_head"]
    (group,) = said["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights = {key: group["weights"][key] for key in ("num_bits", "group_size", "strategy")}
    assert weights == {"num_bits": 4, "group_size": 16, "strategy": "group"}
    assert config.pop("dtype") == "bfloat16"
    read = json.loads((plain / "config.json").read_text())
    assert read.pop("dtype") == "float32"
    assert config == read


def test_include_head_and_json(plain: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run(
        plain, "-o", tmp_path / "out", "--format", "int4", "--include-head", "--json"
    )
    assert code == 0
    report = json.loads(out)
    ours = SafetensorsSource(tmp_path / "out")
    assert {ours.format("model.embed_tokens.weight"), ours.format("lm_head.weight")} == {"int8"}
    assert ours.format("model.layers.0.mlp.up_proj.weight") == "int4"
    assert report["include_head"] is True
    assert report["tables_bytes"] == 2 * (128 * 64 * 8.5 / 8 + 16)
    assert report["quantized_bytes"] == report["num_quantized"] * 4.5 / 8 + 16 * 14
    after = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < after - report["size_after_bytes"] < 20_000  # the header
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in groups["config_groups"].values()]
    assert sorted(targets) == [["Linear"], ["re:.*embed_tokens$", "re:.*lm_head$"]]


def test_shards(plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(plain, "-o", tmp_path / "one")[0] == 0
    write = compressed_writer.write_compressed
    monkeypatch.setattr(
        compressed_writer, "write_compressed", lambda *args: write(*args, max_shard_bytes=30_000)
    )
    monkeypatch.setattr(compressed_writer, "_CHUNK_VALUES", 100)
    assert run(plain, "-o", tmp_path / "many")[0] == 0
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    one, many = SafetensorsSource(tmp_path / "one"), SafetensorsSource(tmp_path / "many")
    assert one.names == many.names
    for name in one.names:
        rows = one.shape(name)[0]
        assert torch.equal(one.rows(name, 0, rows), many.rows(name, 0, rows))


def test_weights_without_whole_groups_stay_plain(plain: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run(plain, "-o", tmp_path / "a", "--format", "int4", "--group-size", "64")
    assert code == 0
    assert "2 weights have no whole groups of 64 columns and stay as they were" in out
    ours = SafetensorsSource(tmp_path / "a")
    assert ours.format("model.layers.0.mlp.down_proj.weight") is None
    assert ours.format("model.layers.0.mlp.up_proj.weight") == "int4"
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert [f"model.layers.{i}.mlp.down_proj" in said["ignore"] for i in (0, 1)] == [True, True]
    code, _, err = run(plain, "-o", tmp_path / "b", "--group-size", "40")
    assert code == 1 and "no weight has whole groups of 40 columns (they have 64, 96;" in err
    odd = ("--format", "int4", "--group-size", "3")
    code, _, err = run(plain, "-o", tmp_path / "c", *odd)
    assert code == 1 and "of an even size for int4" in err and not (tmp_path / "c").exists()
    assert not (tmp_path / "b").exists()


# --- GGUF ---

GGUFS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", 4, 2, {}),
    "llama-tied-llama3": (
        "LlamaForCausalLM",
        4,
        2,
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-linear": ("LlamaForCausalLM", 4, 2, {"rope_parameters": LINEAR}),
    "llama-biases": ("LlamaForCausalLM", 4, 2, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("LlamaForCausalLM", 8, 4, {}),
    "qwen2-yarn": ("Qwen2ForCausalLM", 4, 2, {"rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", 4, 2, {}),
    "gemma3": ("Gemma3ForCausalLM", 4, 1, GEMMA),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_file_becomes_the_folder_it_came_from(case: str, tmp_path: Path) -> None:
    """The exports of the file are transformers' own tensors, and so is the config's meaning."""
    architecture, heads, kv_heads, overrides = GGUFS[case]
    folder = tiny_checkpoint(
        tmp_path / "hf", architecture, heads, kv_heads, **{**SHAPE, **overrides}
    )
    path = tmp_path / "model.gguf"
    model = reference_model(folder)
    write_gguf(model, path, F32)
    spec = read_spec(path)
    exports = gguf_exports(spec, GGUFSource(path))
    expected = dict(model.named_parameters())
    assert {export.name for export in exports} == expected.keys()
    for export in exports:
        values = export.values(0, export.shape[0])
        torch.testing.assert_close(values, expected[export.name].detach(), rtol=0, atol=1e-6)

    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(hf_config(spec)))
    check_read_back(spec, read_spec(again))
    ours = transformers.AutoConfig.from_pretrained(again)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # the same parts in the same shapes
        made = transformers.AutoModelForCausalLM.from_config(ours)
    shapes = {name: parameter.shape for name, parameter in made.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in expected.items()}
    for key in ("vocab_size", "rms_norm_eps", "head_dim", "tie_word_embeddings"):
        assert getattr(ours, key) == pytest.approx(getattr(theirs, key))
    assert _rope(ours) == _rope(theirs)


@pytest.mark.parametrize(("kind", "format_"), [("Q8_0", "int8"), ("Q4_0", "int4")])
def test_blocks_of_the_same_kind_keep_their_codes(
    kind: str, format_: str, plain: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(reference_model(plain), path, gguf.GGMLQuantizationType[kind])
    source = GGUFSource(path)
    exports = gguf_exports(read_spec(path), source)
    targets = choose_targets(exports, format_, 32, include_head=False)  # type: ignore[arg-type]
    output = tmp_path / "out"
    output.mkdir()
    compressed_writer.write_compressed(output, targets, lambda done, total: None)
    config = quantization_config(targets)
    (output / "config.json").write_text(json.dumps({"quantization_config": config}))
    ours = SafetensorsSource(output)
    for export in exports:
        if export.role == "projection":
            rows = export.shape[0]
            assert ours.format(export.name) == format_
            assert torch.equal(ours.rows(export.name, 0, rows), export.values(0, rows))


def test_a_config_that_says_something_else_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, heads=4, kv_heads=2, **SHAPE)
    spec = replace(read_spec(folder), architecture="llama")
    check_read_back(spec, read_spec(folder))
    for change in ({"attention_scale": 3.0}, {"qkv_bias": True}):
        with pytest.raises(Exception, match=f"cannot say this GGUF model's {next(iter(change))}"):
            check_read_back(replace(spec, **change), read_spec(folder))


def test_smollm2_with_tokenizer_and_template(smollm2_gguf: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out"
    code, out, err = run(smollm2_gguf, "-o", output, "--format", "int8", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["quantized_bytes"] * 8 / report["num_quantized"] == pytest.approx(8.5, abs=0.01)
    ours, theirs = load_tokenizer(output), load_tokenizer(smollm2_gguf)
    text = "Hello <|im_start|>wörld 123\n\tx  y"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert set(ours.eos_token_ids) >= set(theirs.eos_token_ids)
    assert ours.special_tokens == theirs.special_tokens
    assert ours.require_chat_template().source == theirs.require_chat_template().source
    fast = transformers.AutoTokenizer.from_pretrained(output)
    assert fast(text)["input_ids"] == theirs.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert fast.apply_chat_template(messages, tokenize=False) == (
        ours.require_chat_template().render(messages, add_generation_prompt=False)
    )


# --- when it goes wrong ---


def test_an_existing_folder_is_left_alone(plain: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, _, err = run(plain, "-o", tmp_path / "out")
    assert code == 1 and "exists already; choose a folder that is new or empty" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    assert run(plain, "-o", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EROFS, "cannot be written")],
)
def test_a_disk_that_fails_leaves_nothing(
    number: int, words: str, plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def failing(*args: Any) -> int:
        written.append(1)
        if len(written) > 5:
            raise OSError(number, os.strerror(number))
        return len(args[1])

    monkeypatch.setattr(safetensors_writer.os, "pwrite", failing)
    code, _, err = run(plain, "-o", tmp_path / "out")
    assert code == 1 and words in err and "choose another folder with -o" in err
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_writing(
    plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = run(plain, "-o", tmp_path / "out")
    assert code == 1 and "1.0 KB free" in err
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_named(plain: Path, tmp_path: Path, run: Run) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "model.layers.0.mlp.up_proj.weight"
    at = 8 + length + header[name]["data_offsets"][0]
    data[at : at + 4] = b"\x00\x00\xc0\x7f"
    (broken / "model.safetensors").write_bytes(data)
    code, _, err = run(broken, "-o", tmp_path / "out")
    assert code == 1 and f"{name} cannot be quantised: the weight holds inf or nan" in err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_killed_in_the_middle_nothing_is_half_there(plain: Path, tmp_path: Path) -> None:
    """SIGKILL while it writes: DIR does not exist, and the next run is not disturbed."""
    slow = (
        "import sys, time\n"
        "from shoal.model import safetensors_writer\n"
        "write = safetensors_writer.SafetensorsWriter.write\n"
        "def slowly(*args):\n"
        "    write(*args); print('writing', flush=True); time.sleep(60)\n"
        "safetensors_writer.SafetensorsWriter.write = slowly\n"
        f"sys.argv = ['shoal', 'quantize', {str(plain)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "from shoal.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"writing")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.partial-")


def _decoder(folder: Path, plain: Path) -> Any:
    return load_decoder(
        folder,
        read_spec(plain),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=select("reference"),
    )


def _sixteen_bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.bfloat16().float() if rows.dim() > 1 else rows


def _rope(config: Any) -> Any:
    """Of transformers' config, without what a default leaves out, numbers rounded."""
    defaults = {"attention_factor", "beta_fast", "beta_slow"}

    def plain_of(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain_of(each) for key, each in part.items() if key not in defaults}
        return float(f"{part:.4g}") if isinstance(part, int | float) else part

    return plain_of(config.rope_parameters)
