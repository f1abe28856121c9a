"""The Jinja environment of chat templates: what transformers offers them, with limits.

Limits are kept by rewriting the template's syntax tree: what a `for` runs over and what `~`
joins pass through counting filters, calls and operators through the sandbox's own hooks.
Knows nothing of messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000
"""Loop rounds and calls in one rendering: a second or so."""

MAX_CHARS = 64_000_000
"""Longest text, or list, that a template may build."""


class Rejected(jinja2.TemplateError):
    """The template called `raise_exception`."""


class BudgetExceeded(jinja2.TemplateError):
    """The template ran too long or built something too large."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """A sandbox with the filters and globals of transformers' `apply_chat_template`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters["format"] = _format
        self.filters[_COUNTED] = _counted
        self.filters[_MEASURED] = _measured
        # Widths would have to be bounded, and no chat template lays text out in columns.
        del self.filters["center"]
        self.globals["raise_exception"] = _raise_exception

    def render(
        self, template: jinja2.Template, variables: dict[str, Any], now: datetime | None
    ) -> str:
        """Renders with a fresh budget; `strftime_now` tells `now`, if there is one."""
        pieces: list[str] = []
        num_chars = 0
        own: dict[str, Any] = {_BUDGET: _Budget(MAX_STEPS)}
        if now is not None:
            own["strftime_now"] = now.strftime
        for piece in template.generate(variables | own):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_CHARS:
                raise BudgetExceeded(f"it renders more than {MAX_CHARS} characters")
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        # Collected first: wrapping a node while searching would find it again.
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, _COUNTED)
        _wrap_concatenations(tree)
        tree.set_environment(self)
        return tree

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        context[_BUDGET].spend(1)
        if any(isinstance(value, int) and value > MAX_STEPS for value in args):
            raise BudgetExceeded("it calls a function with a number above a million")
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise BudgetExceeded("it uses **")
        if operator == "*" and (_size(left) or 1) * _factor(right) > MAX_CHARS:
            raise BudgetExceeded("it repeats a text or list too often")
        if operator == "*" and (_size(right) or 1) * _factor(left) > MAX_CHARS:
            raise BudgetExceeded("it repeats a text or list too often")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return _bounded(super().call_binop(context, operator, left, right))


@dataclass(slots=True)
class _Budget:
    steps_left: int

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise BudgetExceeded(f"it takes more than {MAX_STEPS} steps")


# Names that no template can spell.
_BUDGET, _COUNTED, _MEASURED = " budget", " counted", " measured"


class _GenerationBlock(Extension):
    """`{% generation %}` marks training targets; for a prompt its body is all there is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@jinja2.pass_context
def _counted(context: Context, iterable: Iterable[Any]) -> list[Any]:
    items = list(iterable)
    context[_BUDGET].spend(len(items) + 1)
    return items


def _measured(value: Any) -> Any:
    return _bounded(value)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _wrap_concatenations(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _wrap_concatenations(value)
            if isinstance(value, nodes.Concat):
                setattr(node, field, _filtered(value, _MEASURED))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _wrap_concatenations(item)
                    if isinstance(item, nodes.Concat):
                        value[index] = _filtered(item, _MEASURED)


def _bounded(value: Any) -> Any:
    if _size(value) > MAX_CHARS:
        raise BudgetExceeded("it builds a text or list that is too long")
    return value


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    _check_format(text)
    return do_format(text, *args, **kwargs)


def _check_format(text: str) -> None:
    if re.search(r"\d{6}|\*", text):
        raise BudgetExceeded("it formats text to a width that is too large")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _factor(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise Rejected(message)
