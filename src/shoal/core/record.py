"""What a state machine was told and what it decided, line by line, for whoever looks into it later.

    {"shoal": "engine", "version": 1, "config": {...}, "seed": null}
    [12.25, ["Submit", {...}], [["Emit", {...}], ...]]         when, event, effects

JSON of plain values: a dataclass is an object without what equals its defaults, bytes are base64.
A recording is bounded, and ends by itself (`{"ended": why}`) at its bound or at something that
cannot be written; where the disk is full it just ends, and what is recorded goes on. It holds token
ids, so prompts. Knows nothing of what is recorded.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.core.errors import ConfigError

VERSION = 1
_MOST_BYTES = 256 << 20


class Recorder:
    """Writes one recording; every line is there as soon as it was noted.

    Args:
        folder: where a file of this name is made, or the next one if there is one already.
        what: "engine" or "router", whose `config` it is.
        seed: of the chance it takes, if any.

    Raises:
        ConfigError: nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        what: str,
        config: object,
        seed: int | None = None,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._left_bytes = most_bytes
        header = {"shoal": what, "version": VERSION, "config": plain(config), "seed": seed}
        try:
            self._file = _free_path(folder, name).open("x", encoding="utf-8", buffering=1)
            self._put(json.dumps(header))
        except OSError as error:
            raise ConfigError(
                f"nothing can be recorded in {folder}: {error.strerror}; name another folder"
            ) from error

    def note(self, now: float, event: object, effects: Iterable[object]) -> None:
        """In the order in which they were handled."""
        if self._file.closed:
            return
        try:
            line = json.dumps([now, named(event), [named(each) for each in effects]])
        except TypeError as error:
            self._end(str(error))
            return
        if len(line) > self._left_bytes:
            self._end("the recording is as long as it may be")
            return
        self._write(line)

    def close(self) -> None:
        """Nothing is noted any more."""
        with suppress(OSError):  # it is closed all the same
            self._file.close()

    def _write(self, line: str) -> None:
        try:
            self._put(line)
        except OSError:
            self.close()

    def _put(self, line: str) -> None:
        self._left_bytes -= len(line)
        self._file.write(line + "\n")

    def _end(self, why: str) -> None:
        self._write(json.dumps({"ended": why}))
        self.close()


def named(value: object) -> list[Any]:
    """[its type's name, its fields]."""
    return [type(value).__name__, plain(value)]


def plain(value: object) -> Any:
    """What JSON knows.

    Raises:
        TypeError: it holds something that can't be written.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value):
        return {
            field.name: plain(found)
            for field in dataclasses.fields(value)
            if (found := getattr(value, field.name)) != field.default
        }
    raise TypeError(f"a {type(value).__name__} cannot be recorded")


def _free_path(folder: Path, name: str) -> Path:
    path, number = folder / f"{name}.jsonl", 1
    while path.exists():
        path, number = folder / f"{name}.{number}.jsonl", number + 1
    return path
