"""The `shoal` command line: finds the command, says errors in one line, sets exit codes.

0 done · 1 a ShoalError, one line on stderr (SHOAL_DEBUG=1 shows the traceback) · 2 wrong
usage · 130 Ctrl-C. A command's module is imported when it is asked for, so that
`shoal models` doesn't wait for the server's imports. Knows nothing of what commands do.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shoal.core.errors import ShoalError

COMMANDS = {
    "serve": "shoal.cli.serve:serve",
    "route": "shoal.cli.route:route",
    "chat": "shoal.cli.chat:chat",
    "generate": "shoal.cli.generate:generate",
    "models": "shoal.cli.models:app",
    "bench": "shoal.cli.bench:bench",
    "probe": "shoal.cli.probe:probe",
    "plan": "shoal.cli.plan:plan",
    "simulate": "shoal.cli.simulate:simulate",
    "replay": "shoal.cli.replay:replay_files",
    "doctor": "shoal.cli.doctor:doctor",
    "eval": "shoal.cli.eval:eval_model",
    "quantize": "shoal.cli.quantize:quantize",
    "lab": "shoal.cli.lab:app",
    "up": "shoal.cli.up:up",
    "join": "shoal.cli.join:join",
    "down": "shoal.cli.down:down",
}
"""Command → where its function, or its Typer app with commands of its own, is found."""


def main() -> None:
    """Entry point of the `shoal` script; leaves by SystemExit."""
    app(prog_name="shoal")


class _LazyCommands(TyperGroup):
    """Imports a command when it is asked for, and ends shoal's errors in one line."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Only the names count here: "did you mean" reads them, get_command finds the rest.
        self.commands = dict.fromkeys(COMMANDS, self)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(cmd_name)(function)
        command = typer.main.get_command(target)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except ShoalError as error:
            if os.environ.get("SHOAL_DEBUG", "0") not in ("", "0"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_LazyCommands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve one LLM, fast, from GPUs that don't match.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shoal {version('shoal')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    del version
