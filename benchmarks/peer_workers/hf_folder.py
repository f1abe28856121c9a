"""A GGUF file as the folder of safetensors that transformers and vLLM read, in bfloat16.

    python hf_folder.py IN.gguf FOLDER

Runs in transformers' environment, which knows both formats.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
