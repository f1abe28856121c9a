"""Quantised safetensors checkpoints: which family a folder belongs to, by its config.json.

    quant_method        made by
    awq                 AutoAWQ, "gemm" layout                          awq_checkpoint.py
    gptq                AutoGPTQ, GPTQModel                             gptq_checkpoint.py
    compressed-tensors  llm-compressor, `shoal quantize`                compressed_tensors.py
    fp8, fbgemm_fp8     DeepSeek, Hugging Face                          fp8_checkpoint.py

What a config says of activations is not used: shoal computes them as they are. Knows nothing
of how codes lie in tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from shoal.core.errors import UnsupportedModelError, WeightsError
from shoal.model.awq_checkpoint import read_awq
from shoal.model.compressed_tensors import read_compressed_tensors
from shoal.model.fields import Fields
from shoal.model.fp8_checkpoint import read_fp8
from shoal.model.gptq_checkpoint import read_gptq
from shoal.model.safetensors_files import SafetensorsFiles
from shoal.model.stored_weights import StoredWeight

Found = tuple[dict[str, StoredWeight], frozenset[str]]


def find_stored_weights(files: SafetensorsFiles) -> Found:
    """Quantised weights by the name a plain one would have, and the tensors they hide.

    Raises:
        WeightsError: tensors that are missing or do not fit each other.
        UnsupportedModelError: a family, or a setting of it, that is not read.
    """
    settings = _settings(files)
    if settings is None:
        return {}, frozenset()
    method = settings.text("quant_method", "unknown")
    if method not in _READERS:
        raise UnsupportedModelError(
            f"{settings.source}: weights quantised with {method} are not supported; shoal reads "
            f"{', '.join(_READERS)}: use such a checkpoint, the plain one, or a .gguf file"
        )
    stored = _READERS[method](files, settings)
    # Codes, scales and what was measured of activations: beside a quantised weight or not.
    hidden = {name for name in files.names if name.rpartition(".")[2] in _PARTS}
    return stored, frozenset(hidden)


_READERS: Mapping[str, Callable[[SafetensorsFiles, Fields], dict[str, StoredWeight]]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
}
_PARTS = frozenset(
    [
        *("qweight", "qzeros", "scales", "g_idx"),
        *("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("weight_scale", "weight_scale_inv", "input_scale", "input_scale_ub"),
        *("input_zero_point", "activation_scale", "output_scale", "k_scale", "v_scale"),
    ]
)


def _settings(files: SafetensorsFiles) -> Fields | None:
    path = files.folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}; fetch it again") from error
    for holder in (config, config.get("text_config")) if isinstance(config, dict) else ():
        # "compression_config": what compressed-tensors wrote before 2024-09.
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder, dict) and holder.get(key) is not None:
                return Fields(str(path), holder).child(key)
    return None
