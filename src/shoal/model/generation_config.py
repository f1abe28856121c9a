"""The sampling a checkpoint's makers recommend (generation_config.json). No torch.

As vLLM does by default, a server uses these where a request says nothing. EOS ids of the same
file are read by `spec.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shoal.core.errors import InvalidRequestError, ModelError
from shoal.core.request import SamplingParams

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_default_sampling(path: Path) -> dict[str, Any]:
    """Sampling fields by name; none for a .gguf file, or a folder that has no such file.

    What `SamplingParams` takes: top_k is whole there and 0 is off, where files have 50.0 or -1.

    Raises:
        ModelError: the file is no JSON object, or recommends what nobody may ask for.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}; fetch it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, no object; fetch it again")
    found = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    top_k = found.get("top_k")
    if isinstance(top_k, int | float) and math.isfinite(top_k) and top_k == int(top_k):
        found["top_k"] = max(int(top_k), 0)
    try:
        SamplingParams(**found)
    except InvalidRequestError as error:
        raise ModelError(f"{file}: {error}; mend it, or take the field out") from error
    return found
