"""`shoal models`: what is cached, how large, from where; fetch and remove. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from shoal.cli.options import HfToken, Json, Revision

app = typer.Typer(add_completion=False, help="Cached models: list, pull, remove.")


@app.callback(invoke_without_command=True)
def list_models(ctx: typer.Context, as_json: Json = False) -> None:
    """Cached models: list, pull, remove."""
    if ctx.invoked_subcommand is not None:
        return
    from shoal.model.cache import human_bytes, models_folder
    from shoal.model.catalogue import load_catalogue
    from shoal.model.store import list_cached

    found = list_cached()
    if as_json:
        print(json.dumps([asdict(model) for model in found], default=str, indent=2))
        return
    rows = [("NAME", "SIZE", "SOURCE", "PATH")]
    rows += [(m.name, human_bytes(m.size_bytes), m.source, str(m.path)) for m in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    if found:
        for name, size, source, path in rows:
            print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {source:<{widths[2]}}  {path}")
    else:
        print(f"no models are cached yet (shoal's cache is {models_folder()})")
    absent = sorted(load_catalogue().keys() - {model.name for model in found})
    if absent:
        print(f"\nready to pull: {', '.join(absent)}, or any Hugging Face id (org/name)")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A catalogue name or a Hugging Face id.")],
    revision: Revision = None,
    hf_token: HfToken = None,
) -> None:
    """Download a model, or check a cached one and mend it."""
    from shoal.cli.terminal import find_model

    print(find_model(name, revision, hf_token, verify=True).path)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="As `shoal models` lists it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Delete a cached model."""
    from shoal.model.cache import human_bytes
    from shoal.model.store import find_cached
    from shoal.model.store import remove as remove_from_cache

    model = find_cached(name)
    size = human_bytes(model.size_bytes)
    if not yes:
        typer.confirm(f"Delete {name} ({size}, {model.path})?", abort=True)
    remove_from_cache(name)
    print(f"{name} removed, {size} freed")
