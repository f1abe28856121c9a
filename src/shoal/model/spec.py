"""Reads a ModelSpec from a checkpoint's own files. No torch.

Knows only which reader a path needs: `hf_spec` for a folder, `gguf_spec` for a file.
"""

from __future__ import annotations

from pathlib import Path

from shoal.core.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from shoal.core.model_spec import ModelSpec
from shoal.model.gguf_spec import read_gguf_spec
from shoal.model.hf_spec import read_hf_spec


def read_spec(path: Path) -> ModelSpec:
    """Shapes and rules of the model in a folder (config.json) or a .gguf file.

    Raises:
        ModelNotFoundError: there is no such folder or file.
        UnsupportedModelError: an architecture or feature that shoal does not run.
        ModelError: a file that is malformed.
    """
    spec = _read(path)
    if spec.num_heads % spec.num_kv_heads or spec.head_dim % 2:
        raise ModelError(
            f"{path}: {spec.num_heads} heads share {spec.num_kv_heads} KV heads of {spec.head_dim} "
            "values; needed a multiple of the KV heads, and an even size: the file is corrupt"
        )
    return spec


def _read(path: Path) -> ModelSpec:
    if path.is_dir():
        return read_hf_spec(path)
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist; needed a folder or a .gguf file")
    if path.suffix != ".gguf":
        raise UnsupportedModelError(
            f"{path} is neither a folder nor a .gguf file; name the folder that holds config.json"
        )
    return read_gguf_spec(path)
