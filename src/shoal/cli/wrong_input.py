"""Commands that judge files and numbers before they do anything: what can't be meant ends them.

Exit code 2, as for a flag that there is not: what was got, what was needed, one remedy, in a line.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar, get_args

import typer

from shoal.core.cluster import Cluster, Precision
from shoal.core.errors import ConfigError, ModelError

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")

_OWN_ENGINE = "shoal"


def judges_input(command: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """Of a command's function: `ConfigError` and `ModelError` are the user's to mend."""

    @functools.wraps(command)
    def judged(*args: _Given.args, **flags: _Given.kwargs) -> _Found:
        try:
            return command(*args, **flags)
        except (ConfigError, ModelError) as error:
            if os.environ.get("SHOAL_DEBUG", "0") not in ("", "0"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return judged


def engine_of(name: str, cluster: Cluster) -> str:
    """
    Raises:
        ConfigError: nothing is known of an engine of that name.
    """
    known = sorted({_OWN_ENGINE, *(each.engine for each in cluster.constants)})
    if name not in known:
        raise ConfigError(
            f"--engine is {name!r}; constants are known of {', '.join(known)}: name one of them, "
            "or add constants of yours to the cluster file"
        )
    return name


def precisions_of(names: str, flag: str) -> tuple[Precision, ...]:
    """Of names with commas between them, each once.

    Raises:
        ConfigError: one that there is not, or none.
    """
    known = {str(each): each for each in get_args(Precision)}
    found: list[Precision] = []
    for name in (each.strip() for each in names.split(",")):
        if name not in known:
            raise ConfigError(f"{flag} has {name!r}; it must be one of {', '.join(known)}")
        found.append(known[name])
    return tuple(dict.fromkeys(found))


def share_of(text: str, flag: str) -> float:
    """Of "1%" or "0.01".

    Raises:
        ConfigError: no such number.
    """
    number, percent = text.strip(), 1.0
    if number.endswith("%"):
        number, percent = number[:-1], 0.01
    try:
        found = float(number) * percent
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise ConfigError(f"{flag} is {text!r}; it must be from 0% to 100%, as in {flag} 1%")
    return found
