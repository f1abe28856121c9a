"""`shoal replay FILE...`: recorded runs again, and whether the same is decided.

Reads files and prints; decides nothing itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal.sim.replay import Difference, replay

_SHOWN_CHARS = 400


def replay_files(
    recordings: Annotated[list[Path], typer.Argument(help="recordings of `shoal serve`")],
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Take the decisions of recorded runs again; exit code 1 if any differs."""
    found = {str(path): replay(path) for path in recordings}
    if as_json:
        typer.echo(json.dumps({path: asdict(each) for path, each in found.items()}, indent=1))
    for path, each in found.items() if not as_json else ():
        typer.echo(f"{path}: {each.what}, {each.num_events:,} events decided as recorded")
        if each.ended is not None:
            typer.echo(f"  the recording ends early: {each.ended}")
        if each.difference is not None:
            typer.echo(_shown(each.difference))
    if any(each.difference is not None for each in found.values()):
        raise typer.Exit(1)


def _shown(difference: Difference) -> str:
    recorded, decided = json.dumps(difference.recorded), json.dumps(difference.decided)
    return (
        f"  line {difference.line}, {difference.event}: another decision\n"
        f"    recorded {recorded[:_SHOWN_CHARS]}\n    now      {decided[:_SHOWN_CHARS]}"
    )
