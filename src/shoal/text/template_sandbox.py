"""The Jinja environment of chat templates: what transformers offers them, with limits.

Limits are kept by rewriting the template's syntax tree: what a `for` runs over and what `~`
joins pass through counting filters, calls and operators through the sandbox's own hooks.
Knows nothing of messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg

from shoal.text.template_limits import (
    AT_ONCE,
    GROWTH,
    MAX_CHARS,
    MAX_STEPS,
    OVER_ITEMS,
    Budget,
    BudgetExceeded,
    bounded,
    check_format,
    check_method,
    size,
)


class Rejected(jinja2.TemplateError):
    """The template called `raise_exception`."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """A sandbox with the filters and globals of transformers' `apply_chat_template`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            finalize=_shown,
        )
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {
            **{name: filters[name] for name in AT_ONCE},
            **{name: _limited(name, filters[name]) for name in (*GROWTH, *OVER_ITEMS)},
            **{_COUNTED: _counted, _MEASURED: _measured, _SHOWN: _shown},
        }
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception

    def render(
        self, template: jinja2.Template, variables: dict[str, Any], now: datetime | None
    ) -> str:
        """Renders with a fresh budget; `strftime_now` tells `now`, if there is one."""
        pieces: list[str] = []
        num_chars = 0
        own: dict[str, Any] = {_BUDGET: Budget()}
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
        if any(isinstance(value, int) and value > MAX_STEPS for value in (*args, *kwargs.values())):
            raise BudgetExceeded("it calls a function with a number above a million")
        # Jinja wraps `format`, so that it shows no private attributes.
        method = getattr(function, "__wrapped__", function)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            context[_BUDGET].spend_on(text, args)
            check_method(text, method.__name__, (*args, *kwargs.values()))
        else:
            context[_BUDGET].spend(1)
        return bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise BudgetExceeded("it uses **")
        if operator == "*" and (size(left) or 1) * _factor(right) > MAX_CHARS:
            raise BudgetExceeded("it repeats a text or list too often")
        if operator == "*" and (size(right) or 1) * _factor(left) > MAX_CHARS:
            raise BudgetExceeded("it repeats a text or list too often")
        if operator == "%" and isinstance(left, str):
            check_format(left)
        return bounded(super().call_binop(context, operator, left, right))


# Names that no template can spell.
_BUDGET, _COUNTED, _MEASURED, _SHOWN = " budget", " counted", " measured", " shown"


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
    return bounded(value)


@jinja2.pass_context
def _shown(context: Context, value: Any) -> Any:
    """Before it becomes text: what holds a list twice, and that twice, has no end."""
    if isinstance(value, list | tuple | dict):
        context[_BUDGET].spend_on(value)
    return value


def _limited(name: str, wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that spends what it costs, and is asked first if it may."""
    given = _PassArg.from_obj(wrapped)
    check = GROWTH.get(name)

    @jinja2.pass_context
    def limited(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context[_BUDGET]
        if name == "join":
            value = list(value)
        if check is None:
            budget.spend(1 + size(value) // 10)
        else:
            budget.spend_on(value, args)
            check(value, *args, **kwargs)
        own = {
            _PassArg.context: context,
            _PassArg.eval_context: context.eval_ctx,
            _PassArg.environment: context.environment,
        }
        first = () if given is None else (own[given],)
        return bounded(wrapped(*first, value, *args, **kwargs))

    return limited


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _wrap_concatenations(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _wrap_concatenations(value)
            if isinstance(value, nodes.Concat):
                setattr(node, field, _joined(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _wrap_concatenations(item)
                    if isinstance(item, nodes.Concat):
                        value[index] = _joined(item)


def _joined(concat: nodes.Concat) -> nodes.Filter:
    concat.nodes = [_filtered(node, _SHOWN) for node in concat.nodes]
    return _filtered(concat, _MEASURED)


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
