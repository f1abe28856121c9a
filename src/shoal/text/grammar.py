"""Grammars: which tokens may come next so that the output matches a JSON schema (llguidance).

A schema is a stranger's program. Its size, depth and names are bounded before it is compiled,
and llguidance counts its own work ("fuel"), so compiling takes a second at most and a mask
some milliseconds; both release the GIL. Knows nothing of requests, queues or logits.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from shoal.core.errors import InvalidRequestError
from shoal.core.request import Grammar

MAX_SCHEMA_BYTES = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_NAMES = 1000
"""Property names in a schema: compiling is quadratic in them (2000: 0.7 s, 10 000: 25 s)."""

MAX_SCHEMA_ALL_OF = 8
"""Branches of all `allOf` together: intersecting patterns is exponential in them, and no fuel
counts it (16: 3 s, 24: more than half a minute)."""

_MAX_CACHED = 64
_SHOWN_CHARS = 80

# Small models fill the room that free whitespace leaves them with newlines, for ever: one
# optional space after a comma or colon is what they are used to.
_WHITESPACE = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}


class GrammarCompiler:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer_json: text of a tokenizer.json (`Tokenizer.json`).
        vocab_size: width of the model's logits; ids beyond the tokenizer's are never allowed.
        eos_token_ids: all are allowed where the output may end.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        # Imported here: only servers that are asked for a grammar pay for it.
        import llguidance

        self._llguidance = llguidance
        self._eos_token_ids = frozenset(eos_token_ids)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json,
            n_vocab=vocab_size,
            eos_token=list(eos_token_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )

    def compile(self, grammar: Grammar, prefix_ids: Iterable[int] = ()) -> GrammarMatcher:
        """Compiles a grammar; call it off the step loop.

        Args:
            prefix_ids: output tokens already there; the matcher stands behind them.

        Raises:
            InvalidRequestError: the schema is invalid, unsupported or too large, or
                `prefix_ids` do not match it.
        """
        schema = grammar.schema if grammar.kind == "json_schema" else '{"type": "object"}'
        compiled = GrammarMatcher(self._fresh_matcher(schema), self._eos_token_ids)
        for token_id in prefix_ids:
            if not compiled.advance(token_id):
                raise _invalid("the output so far does not match the schema")
        return compiled

    def _fresh_matcher(self, schema: str) -> Any:
        """A matcher at the beginning of its grammar: a copy where the schema came before."""
        with self._lock:
            if schema in self._compiled:
                self._compiled.move_to_end(schema)
                return self._compiled[schema].deep_copy()
        _check_bounds(schema)
        matchers = self._llguidance.LLMatcher
        try:
            compact = matchers.grammar_from_json_schema(schema, overrides=_WHITESPACE)
        except ValueError as error:
            raise _invalid(f"the schema cannot be used: {error}") from error
        matcher = matchers(self._tokenizer, compact, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _invalid(f"the schema cannot be used: {_in_one_line(matcher.get_error())}")
        with self._lock:
            self._compiled[schema] = matcher
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()


class GrammarMatcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: Any, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids

    def mask(self) -> bytes:
        """Allowed ids: bit `id % 8` of byte `id // 8`, padded with zeros to 4 bytes.

        Raises:
            InvalidRequestError: the grammar is too complex at this point.
        """
        mask: bytes = self._matcher.compute_bitmask()
        self._check_limits()
        return mask

    def advance(self, token_id: int) -> bool:
        """Takes the next output token; False (and no change) if the grammar forbids it.

        An EOS where the output may end is taken without a change: nothing comes after it.

        Raises:
            InvalidRequestError: the grammar is too complex at this point.
        """
        if token_id in self._eos_token_ids:
            return bool(self._matcher.is_accepting())
        allowed = self._matcher.validate_tokens([token_id]) == 1
        taken = allowed and self._matcher.consume_token(token_id)
        self._check_limits()
        return bool(taken)

    @property
    def finished(self) -> bool:
        """Whether nothing but an EOS may follow."""
        return bool(self._matcher.is_stopped())

    def _check_limits(self) -> None:
        if self._matcher.is_error():
            raise _invalid(f"the schema is too complex: {_in_one_line(self._matcher.get_error())}")


def _check_bounds(schema: str) -> None:
    size_bytes = len(schema.encode("utf-8", "replace"))
    if size_bytes > MAX_SCHEMA_BYTES:
        raise _invalid(f"the schema has {size_bytes} bytes; at most {MAX_SCHEMA_BYTES} are allowed")
    try:
        root = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the schema is not JSON: {error or 'nested too deeply'}") from error
    num_names = num_all_of = 0
    level: list[Any] = [root]
    for _ in range(MAX_SCHEMA_DEPTH):
        num_names += sum(map(_num_names, level))
        num_all_of += sum(map(_num_all_of, level))
        level = [child for node in level for child in _children(node)]
    if level:
        raise _invalid(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
    if num_names > MAX_SCHEMA_NAMES:
        raise _invalid(
            f"the schema names {num_names} properties; at most {MAX_SCHEMA_NAMES} are allowed"
        )
    if num_all_of > MAX_SCHEMA_ALL_OF:
        raise _invalid(
            f"the schema joins {num_all_of} schemas with allOf; at most {MAX_SCHEMA_ALL_OF} are "
            f"allowed"
        )


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _num_names(node: Any) -> int:
    if not isinstance(node, dict):
        return 0
    return sum(
        len(node[key])
        for key in ("properties", "patternProperties", "required")
        if isinstance(node.get(key), dict | list)
    )


def _num_all_of(node: Any) -> int:
    all_of = node.get("allOf") if isinstance(node, dict) else None
    return len(all_of) if isinstance(all_of, list) else 0


def _in_one_line(error: str) -> str:
    """The first line says what broke; of a regex, a drawing and the reason come below it."""
    first, _, rest = error.partition("\n")
    reasons = [line for line in rest.splitlines() if line.startswith("error: ")]
    if not reasons:
        return first
    pattern = rest.partition("\n")[0].strip()
    shown = pattern if len(pattern) <= _SHOWN_CHARS else pattern[:_SHOWN_CHARS] + "..."
    return f"{first} {reasons[0].removeprefix('error: ')} (in {shown!r})"


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"response_format: {message}", code="invalid_json_schema", param="response_format"
    )
