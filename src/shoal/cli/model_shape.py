"""The shapes of a model that need not be there whole, to plan and simulate with. No torch."""

from __future__ import annotations

from pathlib import Path

from shoal.core.errors import ModelNotFoundError
from shoal.core.model_spec import ModelSpec
from shoal.model.known_shapes import known_shapes, shape_folder
from shoal.model.spec import read_spec
from shoal.model.store import resolve


def spec_of(model: str) -> ModelSpec:
    """
    Args:
        model: a known shape, a folder with config.json, a .gguf file, or what `serve` takes.

    Raises:
        ModelError: no such model, or one that shoal does not run.
    """
    if model in known_shapes():
        return read_spec(shape_folder(model))
    if Path(model).exists():
        return read_spec(Path(model))
    try:
        return read_spec(resolve(model).path)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error}; shapes that need no download: {', '.join(known_shapes())}"
        ) from error
