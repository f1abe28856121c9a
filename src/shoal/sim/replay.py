"""A recorded run again (`core/record.py`): the same events at the same times to the same state
machine, and whether it decides the same.

Knows nothing of who recorded, or of devices: their results are among the events.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import msgspec

from shoal.core.errors import ConfigError
from shoal.core.record import VERSION, named
from shoal.engine.config import EngineConfig
from shoal.engine.events import Event as EngineEvent
from shoal.engine.state import EngineState
from shoal.router.events import Event as RouterEvent
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState

Handle = Callable[[Any, float], Sequence[object]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event after which something else was decided.

    Attributes:
        line: of the recording, from 1 on.
        event: its name.
        recorded, decided: effects, as they are written.
    """

    line: int
    event: str
    recorded: list[Any]
    decided: list[Any]


@dataclass(frozen=True, slots=True)
class Replay:
    """
    Attributes:
        what: "engine" or "router".
        num_events, num_effects: that were the same.
        ended: why the recording ends before the run did; None: it does not say.
    """

    what: str
    num_events: int
    num_effects: int
    difference: Difference | None = None
    ended: str | None = None


def replay(path: Path) -> Replay:
    """
    Raises:
        ConfigError: no recording, or one of another version.
    """
    try:
        text = path.read_text("utf-8")
        lines, is_cut = text.splitlines(), _is_cut(text)
        found = _replay(lines[: len(lines) - is_cut])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a recording") from error
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{path} is no recording that this version reads ({error}); give a file that "
            "`shoal serve --record` of this version wrote"
        ) from error
    return replace(found, ended="its last line is cut off") if is_cut else found


def _replay(lines: Sequence[str]) -> Replay:
    header = json.loads(lines[0])
    if header["version"] != VERSION:
        raise ValueError(f"version {header['version']}, needed is {VERSION}")
    what, (handle, types) = header["shoal"], _machine(header)
    num_effects = 0
    for number, line in enumerate(lines[1:], start=2):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return Replay(what, number - 2, num_effects, ended=entry["ended"])
        now, (name, fields), recorded = entry
        effects = handle(msgspec.convert(fields, types[name]), now)
        decided = json.loads(json.dumps([named(each) for each in effects]))
        if decided != recorded:
            difference = Difference(number, name, recorded, decided)
            return Replay(what, number - 2, num_effects, difference)
        num_effects += len(decided)
    return Replay(what, len(lines) - 1, num_effects)


def _is_cut(text: str) -> bool:
    """Whether whoever wrote it was killed over its last line, or found the disk full."""
    before, _, last = text.rpartition("\n")
    try:
        json.loads(last or "0")
    except ValueError:
        return bool(before)
    return False


def _machine(header: dict[str, Any]) -> tuple[Handle, dict[str, type]]:
    if header["shoal"] == "engine":
        engine = EngineState(msgspec.convert(header["config"], EngineConfig))
        return engine.handle, _by_name(get_args(EngineEvent))
    router = RouterState(msgspec.convert(header["config"], RouterConfig), Random(header["seed"]))
    return router.handle, _by_name(get_args(RouterEvent))


def _by_name(types: Sequence[type]) -> dict[str, type]:
    return {each.__name__: each for each in types}
