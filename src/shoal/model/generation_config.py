"""The sampling a checkpoint's makers recommend (generation_config.json). No torch.

As vLLM does by default, a server uses these where a request says nothing. EOS ids of the same
file are read by `spec.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.core.errors import ModelError

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_default_sampling(path: Path) -> dict[str, Any]:
    """Sampling fields by name; none for a .gguf file, or a folder that has no such file.

    Raises:
        ModelError: the file is not JSON.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}; fetch it again") from error
    return {name: config[name] for name in _FIELDS if isinstance(config.get(name), int | float)}
