"""Writes a GGUF file again with its large weights in another type.

    python benchmarks/requantize.py IN.gguf OUT.gguf --type Q4_0

Every weight is dequantised to fp32 and quantised by the `gguf` package's own code; metadata and
tokenizer stay as they are. Vectors (norms, biases) stay fp32. With a 4-bit type the embedding
and the output head become Q8_0: what llama-quantize does to a tied embedding whose width is no
multiple of 256, SmolLM2's 576 for one.

It knows nothing of models: benchmarks use it to give several engines the same weights.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.quants import dequantize, quantize

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
_HEADS = ("token_embd.weight", "output.weight")
_SET_BY_WRITER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", Keys.General.ARCHITECTURE)


def requantize(source: Path, target: Path, type_name: str) -> None:
    """Copy a GGUF file with its matrices in `type_name`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields[Keys.General.ARCHITECTURE].contents())
    for field in reader.fields.values():
        if field.name not in (*_SET_BY_WRITER, Keys.General.FILE_TYPE):
            _copy_field(writer, field)
    writer.add_file_type(FILE_TYPES[type_name])
    for tensor in reader.tensors:
        new_type = _new_type(tensor, type_name)
        # GGUF counts dimensions from the innermost, numpy from the outermost.
        shape = [int(size) for size in reversed(tensor.shape)]
        values_per_block, block_bytes = GGML_QUANT_SIZES[new_type]
        num_bytes = math.prod(shape) // values_per_block * block_bytes
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), num_bytes, raw_dtype=new_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:  # one at a time: a model may be larger than memory
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(quantize(values, _new_type(tensor, type_name)))
    writer.close()


def _new_type(tensor: ReaderTensor, type_name: str) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if type_name.startswith("Q4") and tensor.name in _HEADS:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[type_name]


def _copy_field(writer: GGUFWriter, field: ReaderField) -> None:
    kind = field.types[0]
    of_items = field.types[-1] if kind is GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, of_items)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file again in another type.")
    parser.add_argument("source", type=Path, metavar="IN.gguf")
    parser.add_argument("target", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", required=True, choices=FILE_TYPES)
    options = parser.parse_args()
    if options.target.exists():
        sys.exit(f"{options.target} exists already; give another name, or remove it")
    requantize(options.source, options.target, options.type)
    size = options.target.stat().st_size / 1e6
    sys.stdout.write(f"{options.target}: {size:.1f} MB, {options.type}\n")


if __name__ == "__main__":
    main()
