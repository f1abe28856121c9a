"""Shapes of well-known models, by name: their config.json without weights, to plan with.

    shoal plan llama-3.1-405b --cluster cluster.yaml

The files are in `shapes/`, as the makers publish them, cut to what a ModelSpec is read from. What
is here cannot be served: there are no weights. No torch.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def known_shapes() -> tuple[str, ...]:
    """Names of all of them."""
    return tuple(sorted(each.name for each in _root().iterdir() if each.is_dir()))


def shape_folder(name: str) -> Path:
    """The folder that holds a model's config.json; it may not be there."""
    return _root() / name


def _root() -> Path:
    with resources.as_file(resources.files("shoal.model").joinpath("shapes")) as folder:
        return folder
