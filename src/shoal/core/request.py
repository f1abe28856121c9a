"""A request once it is token ids and parameters, and what comes back for it.

`GenerateRequest` goes down (text → router → engine); `Output` comes up. Both cross
processes, so they are plain frozen dataclasses of plain values. Knows nothing of text:
stop strings ride along in `SamplingParams` for `text/`, the engine never looks at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from shoal.core.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
    UpstreamError,
)

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the output must match: a JSON schema (as JSON text) or any JSON object."""

    kind: Literal["json_schema", "json_object"]
    schema: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings follow vLLM and OpenAI.

    For whoever writes them by hand, `stop` may be a single str, `logit_bias` a dict, and any
    iterable will do for a tuple; tuples are what they become.

    Attributes:
        n: how many completions; whoever makes the request expands it, the engine sees 1.
        temperature: 0 is greedy (the lowest id wins a tie).
        top_k: keep the k best tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches this.
        min_p: drop tokens less likely than this share of the best one's probability.
        presence_penalty, frequency_penalty: subtracted from logits, over output tokens.
        repetition_penalty: divides or multiplies logits, over prompt and output tokens.
        logit_bias: (token id, bias) pairs added to the logits, at most 100 either way.
        seed: of the Philox noise, in [0, 2**64); None: the router draws one.
        max_tokens: output tokens at most; None: as many as the context allows.
        min_tokens: no stop token or stop string ends the output before this many.
        stop: strings that end the output (searched by `text/`, cut from the text).
        stop_token_ids: ids that end the output, besides the model's own EOS ids.
        ignore_eos: the model's EOS ids don't end the output.
        logprobs: report this many best tokens for each output token (0: the chosen only).
        prompt_logprobs: the same for each prompt token but the first.
        grammar: what the output must match.
        include_stop_str_in_output, skip_special_tokens: for `text/`.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        # What was not given is as it should be; most of it never is, and this is made per request.
        given = {
            name: value
            for name, default in _DEFAULTS
            if (value := getattr(self, name)) is not default
        }
        for name, value in given.items():
            kinds = _KINDS.get(name)
            if kinds is None:
                continue
            # A bool is an int to Python, but nobody means n=True.
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise _wrong_type(name, value, kinds)
        for name, value in given.items():
            if name in _ITEM_KINDS:
                object.__setattr__(self, name, _as_tuple(name, value, _ITEM_KINDS[name]))
        for name, low, high in _RANGES:
            value = given.get(name)
            # `not (low <= value <= high)` also refuses NaN.
            if value is not None and not (low <= value <= high):
                raise InvalidRequestError(
                    f"{name} is {value}; it must lie between {low} and {high}",
                    code="invalid_value",
                    param=name,
                )
        if self.top_p == 0.0:
            raise InvalidRequestError(
                "top_p is 0; it must be above 0 (temperature=0 gives greedy decoding)",
                code="invalid_value",
                param="top_p",
            )
        for token_id, bias in self.logit_bias:
            if not -_MAX_BIAS <= bias <= _MAX_BIAS:
                raise InvalidRequestError(
                    f"logit_bias of token {token_id} is {bias}; it must lie between "
                    f"{-_MAX_BIAS} and {_MAX_BIAS}",
                    code="invalid_value",
                    param="logit_bias",
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens ({self.max_tokens})",
                code="invalid_value",
                param="min_tokens",
            )
        if any(not stop for stop in self.stop):
            raise InvalidRequestError(
                "stop holds an empty string; remove it", code="invalid_value", param="stop"
            )


_DEFAULTS = tuple((each.name, each.default) for each in fields(SamplingParams))
_INT = (int,)
_FLOAT = (int, float)
_BOOL = (bool,)
_OPTIONAL_INT = (int, type(None))

_KINDS: dict[str, tuple[type, ...]] = {
    "n": _INT,
    "temperature": _FLOAT,
    "top_k": _INT,
    "top_p": _FLOAT,
    "min_p": _FLOAT,
    "presence_penalty": _FLOAT,
    "frequency_penalty": _FLOAT,
    "repetition_penalty": _FLOAT,
    "seed": _OPTIONAL_INT,
    "max_tokens": _OPTIONAL_INT,
    "min_tokens": _INT,
    "ignore_eos": _BOOL,
    "logprobs": _OPTIONAL_INT,
    "prompt_logprobs": _OPTIONAL_INT,
    "grammar": (Grammar, type(None)),
    "include_stop_str_in_output": _BOOL,
    "skip_special_tokens": _BOOL,
}

# Of a pair, the kinds of both halves.
_ITEM_KINDS: dict[str, tuple[type, ...]] = {
    "stop": (str,),
    "stop_token_ids": (int,),
    "logit_bias": (int, float),
}


def _as_tuple(name: str, given: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    if isinstance(given, str):
        given = (given,)
    elif isinstance(given, Mapping):
        given = given.items()
    if not isinstance(given, Iterable):
        raise _wrong_type(name, given, kinds)
    return tuple(_item(name, item, kinds) for item in given)


def _item(name: str, given: Any, kinds: tuple[type, ...]) -> Any:
    if name != "logit_bias":
        if not isinstance(given, kinds):
            raise _wrong_type(name, given, kinds)
        return given
    match given:
        case (int() as token_id, (int() | float()) as bias):
            return (token_id, bias)
    raise _wrong_type(name, given, kinds)


def _wrong_type(name: str, value: object, kinds: tuple[type, ...]) -> InvalidRequestError:
    needed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    return InvalidRequestError(
        f"{name} holds {str(value)[:64]!r} of type {type(value).__name__}; it must be {needed}",
        code="invalid_value",
        param=name,
    )


_MAX_BIAS = 100
MAX_COMPLETIONS = 128
MAX_LOGPROBS = 20

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, MAX_COMPLETIONS),
    ("temperature", 0.0, 100.0),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 100.0),
    ("seed", 0, 2**64 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of the `index`-th of a prompt's `n` completions: seed + index, as in vLLM."""
    return (seed + index) % 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate.

    A continued request carries what was already produced in `output_ids`: those tokens are
    forced, count towards min/max tokens, penalties and usage, and are not sent again.

    Attributes:
        request_id: unique among those in flight.
        prompt_ids: at least one token id.
        output_ids: output tokens already committed elsewhere.
        priority: lower is served earlier (vLLM's meaning).
        timeout_s: seconds from submission to the last token; None: no limit.
        salt: keeps tenants out of each other's prefix cache.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    priority: int = 0
    timeout_s: float | None = None
    salt: str = ""

    @property
    def may_go_on(self) -> bool:
        """Whether its output ids are all that another replica needs to go on with it."""
        return True

    @property
    def tells_progress(self) -> bool:
        """Whether outputs come while it runs; otherwise there is only a last one, and silence
        says nothing of who serves it."""
        return True


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, of the raw logits) at one position.

    Attributes:
        token_id, logprob, rank: the token that stands there; rank 1 is the likeliest.
        top: (token id, logprob) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """A `RequestError` that can cross a process."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @staticmethod
    def of(error: RequestError) -> ErrorInfo:
        return ErrorInfo(
            status=error.status,
            code=error.code,
            message=str(error),
            param=error.param,
            retry_after_s=error.retry_after_s,
        )

    def to_exception(self) -> RequestError:
        kind = _ERROR_BY_STATUS.get(self.status, RequestError)
        return kind(
            self.message, code=self.code, param=self.param, retry_after_s=self.retry_after_s
        )


_ERROR_BY_STATUS: dict[int, type[RequestError]] = {
    kind.status: kind
    for kind in (
        *(InvalidRequestError, QueueFullError, UpstreamError),
        *(UnavailableError, RequestTimeoutError),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """News of one request. The one with `finish` set is its last: its terminal event.

    Attributes:
        token_ids: tokens newly produced (a stop token is among them).
        logprobs: one per token of `token_ids`, if asked for.
        prompt_logprobs: one per prompt token but the first, once, if asked for.
        finish: why it ended.
        stop_token_id: the id that ended it, when `finish` is "stop".
        error: what went wrong, when `finish` is "error".
        num_cached_tokens: prompt tokens whose KV was found cached (first output only).
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int | None = None

    @classmethod
    def joined(cls, outputs: Sequence[Self]) -> Self:
        """Outputs of one request that came one after the other, as one."""
        first, last = outputs[0], outputs[-1]
        return replace(
            last,
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            logprobs=tuple(entry for output in outputs for entry in output.logprobs),
            prompt_logprobs=first.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
        )
