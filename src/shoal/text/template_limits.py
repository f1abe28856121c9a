"""What a chat template may build and how long it may take: reckoned before it is done.

    a step            a loop's round, a call, a filter
    long operands     more steps: one for ten items, or for a thousand characters
    text that grows   refused if what it grows to is above `MAX_CHARS`

Knows nothing of Jinja's syntax, of messages, or of which template it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

MAX_STEPS = 1_000_000
"""In one rendering: a second or so."""

MAX_CHARS = 64_000_000
"""Longest text, or list, that a template may build."""


class BudgetExceeded(jinja2.TemplateError):
    """The template ran too long or built something too large."""


@dataclass(slots=True)
class Budget:
    """Of one rendering."""

    steps_left: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise BudgetExceeded(f"it takes more than {MAX_STEPS} steps")

    def spend_on(self, *operands: Any) -> int:
        """The steps of what looks at all of the operands; returns their characters."""
        num_chars, num_items = weigh(operands)
        self.spend(1 + num_items // 10 + num_chars // 1000)
        return num_chars


def weigh(value: Any) -> tuple[int, int]:
    """Characters of the texts in it, and how many values there are, however deep."""
    num_chars = num_items = 0
    left = [value]
    while left:
        each = left.pop()
        num_items += 1
        if isinstance(each, str):
            num_chars += len(each)
        elif isinstance(each, Mapping):
            left += each.keys()
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each
        # What holds itself twice, and so on, has no end.
        if num_chars > MAX_CHARS or num_items > MAX_STEPS:
            raise BudgetExceeded("it builds a text or list that is too long")
    return num_chars, num_items


def size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


def bounded(value: Any) -> Any:
    if size(value) > MAX_CHARS:
        raise BudgetExceeded("it builds a text or list that is too long")
    return value


def check_format(text: str) -> None:
    """Refuses widths, in % or in format(), that make much of little."""
    widths = re.findall(r"\d+", text)
    is_open = re.search(r"\d{6}|\*|\{[^{}]*\{", text) is not None
    if is_open or sum(map(int, widths)) > MAX_CHARS:
        raise BudgetExceeded("it formats text to a width that is too large")


def check_method(text: str, name: str, arguments: tuple[Any, ...]) -> None:
    """Refuses a call of a string's method that would give too long a text."""
    if name in ("format", "format_map"):
        check_format(text)
    elif name == "expandtabs":
        check_growth(text.count("\t"), arguments[0] if arguments else 8)
    elif name == "replace" and len(arguments) >= 2:
        check_replace(text, arguments[0], arguments[1])
    elif name == "join" and arguments:
        check_growth(size(arguments[0]), len(text))


def check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str):
        check_growth(text.count(old), size(new))


def check_growth(count: int, each: Any) -> None:
    if isinstance(each, int) and count * each > MAX_CHARS:
        raise BudgetExceeded("it builds a text or list that is too long")


def _join(items: Iterable[Any], between: Any = "", *_attribute: Any, **_named: Any) -> None:
    check_growth(size(items), size(between))


def _replace(text: Any, old: Any = "", new: Any = "", *_count: Any, **_named: Any) -> None:
    check_replace(str(text), old, new)


def _indent(text: Any, width: Any = 4, *_flags: Any, **named: Any) -> None:
    width = named.get("width", width)
    lines = str(text).count("\n") + 1
    check_growth(lines, len(width) if isinstance(width, str) else width)


def _tojson(_value: Any, *_args: Any, indent: Any = None, separators: Any = (), **_: Any) -> None:
    if size(indent) > 16 or (isinstance(indent, int) and indent > 16) or weigh(separators)[0] > 16:
        raise BudgetExceeded("it formats JSON with too much between its values")


def _format(text: Any, *_args: Any, **_named: Any) -> None:
    check_format(str(text))


def _nothing(*_args: Any, **_named: Any) -> None:
    pass


GROWTH: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("upper", "lower", "trim", "title", "capitalize", "string"), _nothing),
    **dict.fromkeys(("escape", "e", "forceescape", "wordcount", "safe"), _nothing),
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "tojson": _tojson,
    "format": _format,
}
"""Filters that read all of their text, and what refuses those that would make too much of it."""

OVER_ITEMS = frozenset(
    [
        *("list", "sort", "unique", "reverse", "sum", "dictsort", "groupby", "min", "max", "map"),
        *("select", "reject", "selectattr", "rejectattr", "items"),
    ]
)
"""Filters that look at each item."""

AT_ONCE = frozenset(
    [*("length", "count", "first", "last", "default", "d", "attr", "abs", "int", "float", "round")]
)
"""Filters that take no time to speak of. Others are not offered: no chat template lays out text."""
