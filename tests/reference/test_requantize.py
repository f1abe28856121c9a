"""benchmarks/requantize.py: what becomes of weights, vectors, metadata and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import reference_model, tiny_checkpoint
from gguf.quants import dequantize, quantize
from gguf_files import write_gguf

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "requantize.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    model = reference_model(
        tiny_checkpoint(folder, heads=8, kv_heads=4, head_dim=16, intermediate_size=96)
    )
    path = folder / "source.gguf"

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_token_list(["a", "é", "</s>"])
        writer.add_string("tokenizer.chat_template", "{{ messages }}")

    write_gguf(model, path, gguf.GGMLQuantizationType.F32, extra)
    return path


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("kind", "head_kind", "file_type"),
    [("Q4_0", "Q8_0", 2), ("Q4_1", "Q8_0", 3), ("Q8_0", "Q8_0", 7), ("BF16", "BF16", 32)],
)
def test_matrices_change_and_nothing_else(
    kind: str, head_kind: str, file_type: int, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.gguf"
    assert run(source, target, "--type", kind).returncode == 0
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    fields = {name: field.contents() for name, field in before.fields.items()}
    fields["general.file_type"] = file_type
    assert {name: field.contents() for name, field in after.fields.items()} == fields
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        is_head = old.name in ("token_embd.weight", "output.weight")
        wanted = "F32" if len(old.shape) == 1 else head_kind if is_head else kind
        assert new.tensor_type.name == wanted
        assert new.shape.tolist() == old.shape.tolist()
        expected = dequantize(quantize(old.data, new.tensor_type), new.tensor_type)
        np.testing.assert_array_equal(dequantize(new.data, new.tensor_type), expected)


def test_a_file_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.gguf"
    target.write_text("mine")
    done = run(source, target, "--type", "Q8_0")
    assert done.returncode == 1 and "exists already" in done.stderr
    assert target.read_text() == "mine"
