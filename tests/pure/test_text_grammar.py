"""Grammars: what they allow, token by token, and that no schema is too much for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.core.errors import InvalidRequestError
from shoal.core.request import Grammar
from shoal.text import Tokenizer
from shoal.text.gguf_tokenizer import build_gguf_tokenizer
from shoal.text.grammar import GrammarCompiler, GrammarMatcher
from text_models import byte_level_metadata

EOS, OTHER_EOS, LOGITS_WIDTH = 260, 259, 300
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = build_gguf_tokenizer(byte_level_metadata())
    return Tokenizer(backend, special_tokens={}, eos_token_ids=(EOS,), chat_template=None)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.json, LOGITS_WIDTH, (EOS, OTHER_EOS))


def _schema(schema: Any) -> Grammar:
    return Grammar(kind="json_schema", schema=json.dumps(schema))


def _allowed(matcher: GrammarMatcher) -> set[int]:
    mask = matcher.mask()
    assert len(mask) == -(-LOGITS_WIDTH // 32) * 4
    return {i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1}


@pytest.mark.parametrize("text", ['{"name":"hello","age":-3}', '{"name": "é\\n", "age": 12}'])
def test_matching_output_is_taken_and_then_only_eos(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str
) -> None:
    matcher = compiler.compile(_schema(PERSON))
    for token_id in tokenizer.encode(text):
        assert token_id in _allowed(matcher)
        assert not matcher.finished
        assert matcher.advance(token_id)
    assert matcher.finished
    assert _allowed(matcher) == {EOS, OTHER_EOS}
    assert matcher.advance(OTHER_EOS)


def test_forbidden_tokens_change_nothing(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(_schema(PERSON))
    for forbidden in (ord("["), EOS, LOGITS_WIDTH - 1):
        assert not matcher.advance(forbidden)
    assert _allowed(matcher) == {ord("{")}


def test_whitespace_cannot_go_on_for_ever(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar(kind="json_object"))
    assert matcher.advance(ord("{"))
    assert _allowed(matcher) & set(b" \n\t") == set()


def test_any_json_object_but_nothing_else(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = Grammar(kind="json_object")
    for first in b'["1tn':
        assert not compiler.compile(grammar).advance(first)
    ids = tokenizer.encode('{"a": [1, {"b": null}], "c": 2.5e-3}')
    assert compiler.compile(grammar, ids).finished


def test_a_prefix_rebuilds_the_state(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode('{"name":"hello","age":1')
    for cut in range(len(ids)):
        fresh, rebuilt = (
            compiler.compile(_schema(PERSON)),
            compiler.compile(_schema(PERSON), ids[:cut]),
        )
        assert all(fresh.advance(token_id) for token_id in ids[:cut])
        assert fresh.mask() == rebuilt.mask()
    with pytest.raises(InvalidRequestError, match="so far"):
        compiler.compile(_schema(PERSON), tokenizer.encode("["))


def _nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED = {
    "not JSON": "{",
    "not an object": "[]",
    "unknown type": '{"type": "foo"}',
    "unsupported keyword": '{"type": "object", "not": {}}',
    "unsatisfiable": '{"type": "string", "minLength": 5, "maxLength": 2}',
    "remote reference": '{"$ref": "https://example.com/a.json"}',
    "file reference": '{"$ref": "file:///etc/passwd"}',
    "too large": json.dumps({"const": "x" * 70_000}),
    "too deep": json.dumps(_nested(100)),
    "far too deep": '{"a":' * 10_000,
    "too many names": json.dumps({"properties": {f"p{i}": {} for i in range(1001)}}),
    "product of unions": json.dumps(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(8)
            ]
        }
    ),
}


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED.keys())
def test_schemas_that_cannot_be_used_are_refused(compiler: GrammarCompiler, schema: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(Grammar(kind="json_schema", schema=schema))
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format")


def test_what_is_wrong_with_a_pattern_is_said_in_one_line(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(_schema_grammar({"type": "string", "pattern": "(abc" + "d" * 500}))
    message = str(caught.value)
    assert "unclosed group" in message
    assert "(abcd" in message
    assert len(message) < 250
    assert "\n" not in message


def _schema_grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", schema=json.dumps(schema))


COSTLY = {
    "names": {"properties": {f"p{i}": {} for i in range(1000)}},
    "enum": {"enum": [f"value {i}" for i in range(4000)]},
    "repeated stars": {"type": "string", "pattern": "((a|a)*){1000}"},
    "nested repeats": {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100})$"},
    "exponential automaton": {"type": "string", "pattern": "^(.*a.{20}){50}$"},
    "recursion": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"properties": {"c": {"items": {"$ref": "#/$defs/n"}}}}},
    },
    "reference loop": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "long": {"type": "string", "minLength": 100_000},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("schema", COSTLY.values(), ids=COSTLY.keys())
def test_costly_schemas_are_served_or_refused_in_time(
    compiler: GrammarCompiler, schema: Any
) -> None:
    try:
        matcher = compiler.compile(_schema(schema))
        for _ in range(60):
            allowed = _allowed(matcher) - {EOS, OTHER_EOS}
            if not allowed:
                break
            assert matcher.advance(max(allowed))
    except InvalidRequestError as error:
        assert error.code == "invalid_json_schema"


def test_many_joined_patterns_are_refused_before_they_cost_anything(
    compiler: GrammarCompiler,
) -> None:
    schema = {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(24)]}
    with pytest.raises(InvalidRequestError, match="allOf"):
        compiler.compile(Grammar(kind="json_schema", schema=json.dumps(schema)))


def test_a_schema_that_came_before_starts_afresh(compiler: GrammarCompiler) -> None:
    grammar = Grammar(kind="json_schema", schema='{"type": "boolean"}')
    first, second = compiler.compile(grammar), compiler.compile(grammar)
    before = second.mask()
    allowed = next(i for i in range(len(before) * 8) if before[i // 8] >> i % 8 & 1)
    assert first.advance(allowed)
    assert second.mask() == before == compiler.compile(grammar).mask()
