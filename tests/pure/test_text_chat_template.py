"""Chat templates: what they render, whose fault an error is, and that none can hang or escape."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from shoal.core.errors import InvalidRequestError, ModelError
from shoal.text import ChatTemplate
from text_models import SMALL_TEMPLATE

USER = {"role": "user", "content": "hi"}
NOW = datetime(2025, 3, 1)


def _render(source: str, *messages: dict[str, Any], **kwargs: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    return template.render(messages or (USER,), now=NOW, **kwargs)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (SMALL_TEMPLATE, "<s>user: hi</s><s>assistant: "),
        ("{{ bos_token }}{{ messages | length }}", "<s>1"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ strftime_now('%Y-%m') }}", "2025-03"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% if true %}\n  a\n{% endif %}\nb", "  a\nb"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n ~ '!' }}", "2!"),
        ("{{ '%03d|%s' % (7, 'x') }}{{ '-' * 3 }}", "007|x---"),
        ("{{ tools is none }}{{ custom }}", "True5"),
        ("{{ [1, {'a': 'b'}] ~ '' }}{{ [3, 1] | sort }}", "[1, {'a': 'b'}][1, 3]"),
        ("{{ ' a-b ' | trim | replace('-', '+') | upper }}", "A+B"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ {'a': [1]} | tojson(indent=4) }}", '{\n    "a": [\n        1\n    ]\n}'),
        ("{{ 'a\nb' | indent(2) }}{{ none | default('x', true) }}", "a\n  bx"),
        ("{{ '{:>3}'.format('x') }}{{ '%s-%s' | format(1, 2) }}", "  x1-2"),
        ("{{ '</t>b'.split('</t>')[-1].replace('b', 'cc') }}{{ ', '.join(['a', 'b']) }}", "cca, b"),
    ],
)
def test_renders_as_transformers_does(source: str, text: str) -> None:
    assert _render(source, template_kwargs={"custom": 5}) == text


def test_without_a_date_templates_find_no_clock() -> None:
    template = ChatTemplate("{{ strftime_now is defined }}", {})
    assert template.render([USER]) == "False"


def test_the_final_message_can_be_continued() -> None:
    draft = {"role": "assistant", "content": "Once upon "}
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    assert _render(SMALL_TEMPLATE, USER, draft, **settings).endswith("<s>assistant: Once upon ")
    trimming = SMALL_TEMPLATE.replace("m['content']", "m['content'] | trim")
    assert _render(trimming, USER, draft, **settings).endswith("<s>assistant: Once upon")
    assert draft["content"] == "Once upon "
    parts = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    nested = "{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}"
    assert _render(nested, parts, **settings) == "a"


@pytest.mark.parametrize(
    ("source", "messages", "settings"),
    [
        (SMALL_TEMPLATE, (USER,), {"continue_final_message": True}),
        (SMALL_TEMPLATE, ({"role": "user"},), {"continue_final_message": True}),
        ("hidden", (USER,), {"continue_final_message": True}),
        ("{{ raise_exception('no system role') }}", (USER,), {}),
        ("{{ 'x' + messages[0]['content'] }}", ({"role": "user", "content": None},), {}),
        ("{{ 'x' + messages[0]['content'] }}", ({"role": "user"},), {}),
        ("{{ messages[0].tool_calls[0].id }}", (USER,), {}),
    ],
)
def test_messages_that_do_not_fit_are_the_clients_fault(
    source: str, messages: tuple[dict[str, Any], ...], settings: dict[str, bool]
) -> None:
    if source == "hidden":
        settings = {**settings, "add_generation_prompt": False}
    with pytest.raises(InvalidRequestError) as caught:
        _render(source, *messages, **settings)
    assert caught.value.code == "invalid_messages"


HOSTILE = {
    "syntax": "{% for",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loops over strings": "{% set s = 'x' * 9999 %}{% for a in s %}{% for b in s %}"
    "{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "adding": "{% set n = namespace(x='aa') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "repeating": "{{ 'a' * 9999999999 }}",
    "repeating from the left": "{{ 9999999999 * 'a' }}",
    "padding": "{{ 'a'.ljust(9999999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "joining": "{% set n = namespace(x='aa') %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "joining with much": "{% set s = 'x' * 9000000 %}{{ range(9999) | join(s) }}",
    "a method that joins": "{% set s = 'x' * 9000000 %}{{ s.join(['a'] * 9999) }}",
    "replacing": "{% set s = 'x' * 99999 %}{{ s | replace('x', s) }}",
    "a method that replaces": "{% set s = 'x' * 99999 %}{{ s.replace('x', s) }}",
    "replacing nothing": "{% set s = 'x' * 99999 %}{{ s.replace('', s) }}",
    "tabs": "{% set s = '\t' * 999999 %}{{ s.expandtabs(999999) }}",
    "indent": "{% set s = '\n' * 999999 %}{{ s | indent(999999) }}",
    "indented JSON": "{{ range(99999) | list | tojson(indent=99999) }}",
    "separated JSON": "{% set s = 'x' * 99999 %}"
    "{{ range(9999) | list | tojson(separators=(s, s)) }}",
    "lists in lists": "{% set n = namespace(x=['aa']) %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "joined lists in lists": "{% set n = namespace(x=['aa']) %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x ~ '' }}",
    "lists in lists as JSON": "{% set n = namespace(x=['aa']) %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "a width in format()": "{{ '{:99999999}'.format(1) }}",
    "widths in format()": "{{ ('{:99999}' * 9999).format(*range(9999)) }}",
    "a width that is told": "{{ '{:{}}'.format(1, 999999) }}",
    "filters": "{% for a in range(900) %}{{ range(99999) | sum }}{% endfor %}",
    "wrapping": "{{ ('a' * 9999999) | wordwrap(1) }}",
    "output": "{% set s = 'x' * 1000000 %}{% for a in range(100) %}{{ s }}{% endfor %}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_soon_in_a_model_error(source: str) -> None:
    with pytest.raises(ModelError):
        _render(source)


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(ModelError, match="characters"):
        ChatTemplate("x" * 2_000_000, {})
