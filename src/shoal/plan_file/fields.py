"""A YAML file as fields that know where they stand: every error names file, line and key.

Only plain YAML: anchors, aliases and tags are refused, size and depth are bounded, and no value
is made into anything but text, numbers, lists and mappings. Knows nothing of plans.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal.core.errors import ConfigError
from shoal.core.split import Range

MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 16
_SHOWN = 60
_UNWRITABLE = "[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]"
"""In double quotes YAML can say what no file name or terminal takes."""


def read_fields(path: Path) -> Field:
    """The root of a YAML (or JSON) file.

    Raises:
        ConfigError: it cannot be read, is too large, or is not plain YAML.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: {reason}; give a readable YAML file") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes; give a smaller file")
    try:
        loader = _Loader(text, str(path))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}:{line}: the character {text[error.position]!r} may not be in YAML; remove it"
        ) from error
    try:
        node: yaml.Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = error.problem or error.context
        raise ConfigError(f"{path}:{line}: {problem}; mend the YAML there") from error
    except (ValueError, OverflowError) as error:
        # An escape such as "\U00110000".
        raise ConfigError(
            f"{path}:{loader.line + 1}: an escape in quotes is no character; mend it"
        ) from error
    if node is None:
        raise ConfigError(f"{path} is empty; write at least a key and its value")
    return Field(str(path), "the file", node)


class _Loader(yaml.SafeLoader):
    """Nodes of a document, without what could make a small file large."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            self._refuse("anchors and aliases (& and *) are not read; write the value out", event)
        if getattr(event, "tag", None) not in (None, "!"):
            self._refuse("tags (!) are not read; write the plain value", event)
        if self._depth >= _MAX_DEPTH:
            self._refuse(f"nested more than {_MAX_DEPTH} deep", event)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str, event: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


@dataclass(frozen=True, slots=True)
class Field:
    """A value in a file.

    Attributes:
        file: as it was named.
        name: of the value, for people: "layers", "heads".
        node: what the parser made of it.
    """

    file: str
    name: str
    node: yaml.Node

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1

    def error(self, problem: str) -> ConfigError:
        """An error at this place: `problem` says what was got, what was needed, one remedy."""
        return ConfigError(f"{self.file}:{self.line}: {problem}")

    def wrong(self, needed: str) -> ConfigError:
        """An error that shows the value."""
        return self.error(f"{self.name} is {self.shown}; it must be {needed}")

    @property
    def shown(self) -> str:
        match self.node:
            case yaml.ScalarNode(value=value):
                return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
            case yaml.SequenceNode(value=value):
                return f"a list of {len(value)}"
            case _:
                return "a mapping"

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        return isinstance(self.node, yaml.SequenceNode)

    def entries(self, keys: Sequence[str] | None = None) -> dict[str, Field]:
        """Of a mapping, by key.

        Args:
            keys: those there may be; None: any.

        Raises:
            ConfigError: not a mapping, a key that may not be there, or one that stands twice.
        """
        found: dict[str, Field] = {}
        for key, value in self.pairs(keys):
            name = key.text()
            if keys is not None and name not in keys:
                raise key.error(f"unknown key {key.shown}; {_remedy(name, keys)}")
            if name in found:
                raise key.error(
                    f"{name} stands there twice (first in line {found[name].line}); remove one"
                )
            found[name] = value
        return found

    def pairs(self, keys: Sequence[str] | None = None) -> list[tuple[Field, Field]]:
        """Keys and values of a mapping, as they stand there; `keys`: for the error.

        Raises:
            ConfigError: not a mapping.
        """
        if not isinstance(self.node, yaml.MappingNode):
            needed = f"a mapping with keys of {', '.join(keys)}" if keys else "a mapping"
            raise self.wrong(needed)
        return [
            (Field(self.file, "the key", key), Field(self.file, str(key.value), value))
            for key, value in self.node.value
        ]

    def items(self, most: int, least: int = 1) -> list[Field]:
        """Of a list that is not empty, unless `least` is 0.

        Raises:
            ConfigError: not a list, empty, or longer than `most`.
        """
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("a list")
        if not self.node.value and least:
            raise self.error(f"{self.name} is an empty list; name at least one, or leave it out")
        if len(self.node.value) > most:
            raise self.error(
                f"{self.name} has {len(self.node.value)} entries; {most} at most: shorten it"
            )
        return [Field(self.file, self.name, node) for node in self.node.value]

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value:
            raise self.wrong("text")
        if re.search(_UNWRITABLE, self.node.value):
            raise self.wrong("text without control characters")
        return str(self.node.value)

    def choice(self, values: Sequence[str]) -> str:
        value = self.text()
        if value not in values:
            near = difflib.get_close_matches(value, values, n=1)
            raise self.wrong(f"one of {', '.join(values)}" + (f" ({near[0]}?)" if near else ""))
        return value

    def integer(self, least: int, most: int) -> int:
        text = self.text()
        if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise self.wrong(f"a whole number from {least} to {most}")
        return int(text)

    def range(self) -> Range:
        found = re.fullmatch(r"([0-9]{1,5}) *- *([0-9]{1,5})", self.text())
        if not found or int(found[1]) > int(found[2]):
            raise self.wrong("a range such as 4-21 (4 to 20: the end is not part of it)")
        return Range(int(found[1]), int(found[2]))

    def number(self, least: float, most: float) -> float:
        needed = f"a number from {least:g} to {most:g}"
        try:
            value = float(self.text())
        except ValueError:
            raise self.wrong(needed) from None
        if not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(needed)
        return value


def _remedy(name: str, keys: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, keys, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(keys)}, or remove it"
