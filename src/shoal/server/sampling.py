"""A request body's fields → `SamplingParams` and `GenerateRequest`s.

Knows nothing of text: prompts arrive as token ids.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from shoal.core.errors import InvalidRequestError
from shoal.core.request import GenerateRequest, Grammar, SamplingParams, seed_of_choice
from shoal.server.openai_types import GenerationFields, ResponseFormat
from shoal.text.grammar import MAX_SCHEMA_BYTES

MAX_PROMPT_LOGPROBS = 1_000_000
"""Prompt tokens x completions x candidates of one HTTP request: about half a GiB while it is
answered."""

_WITH_MODEL_DEFAULT = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_PLAIN = (
    "n",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def sampling_params(
    body: GenerationFields,
    *,
    model_defaults: Mapping[str, float],
    vocab_size: int,
    max_tokens: int,
    logprobs: int | None,
) -> SamplingParams:
    """What the body asks for; what it leaves open is as the model's generation_config or else
    OpenAI has it. Raises InvalidRequestError, naming the field."""
    chosen = {name: getattr(body, name) for name in _PLAIN}
    for name in _WITH_MODEL_DEFAULT:
        value = getattr(body, name)
        chosen[name] = model_defaults.get(name) if value is None else value
    top_k = model_defaults.get("top_k", 0) if body.top_k is None else body.top_k
    stop = body.stop or ()
    check_token_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    return SamplingParams(
        **{name: value for name, value in chosen.items() if value is not None},
        top_k=max(int(top_k), 0),  # vLLM says -1 for off
        # Negative seeds are fine with OpenAI; ours are 64 bits without a sign.
        seed=None if body.seed is None else body.seed % 2**64,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        max_tokens=max_tokens,
        logprobs=logprobs,
        grammar=_grammar(body.response_format),
    )


def generate_requests(
    body: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    request_id: str,
    tenant: str,
    timeout_s: float | None,
) -> tuple[GenerateRequest, ...]:
    """One per completion: all of the first prompt, then all of the second, and so on.

    With a seed, the i-th completion of a prompt samples with seed + i, as in vLLM.
    """
    _check_prompt_logprobs(body, prompts, params)
    salt = f"{tenant}/{body.cache_salt or ''}" if tenant or body.cache_salt else ""
    return tuple(
        GenerateRequest(
            request_id=f"{request_id}-{i}",
            prompt_ids=prompts[i // params.n],
            sampling=_single(params, i % params.n),
            output_ids=tuple(body.output_token_ids or ()),
            priority=body.priority,
            timeout_s=timeout_s,
            salt=salt,
        )
        for i in range(len(prompts) * params.n)
    )


def _check_prompt_logprobs(
    body: GenerationFields, prompts: Sequence[tuple[int, ...]], params: SamplingParams
) -> None:
    """They are held and sent as a whole, unlike output, which comes token by token."""
    if params.prompt_logprobs is None:
        return
    num_entries = sum(map(len, prompts)) * params.n * (params.prompt_logprobs + 1)
    if num_entries > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"Log-probabilities of {sum(map(len, prompts))} prompt tokens x n={params.n} x "
            f"{params.prompt_logprobs + 1} each are {num_entries} entries; at most "
            f"{MAX_PROMPT_LOGPROBS} can be asked for at once. Lower n or the number of logprobs, "
            f"or send the prompts one by one.",
            code="too_many_logprobs",
            # With echo, it is `logprobs` that asks for the prompt's.
            param="logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )


def output_budget(
    requested: int | None,
    default: int | None,
    *,
    prompt_len: int,
    max_model_len: int,
    param: str,
    limit_param: str = "max_tokens",
) -> int:
    """Output tokens a prompt may have; only a default is ever cut to what the context allows.

    Args:
        param, limit_param: fields the prompt and `requested` came in; an error names the one
            that is too much.
    """
    room = max_model_len - prompt_len
    if room < 1 or (requested is not None and requested > room):
        wanted = f" and {limit_param} asks for {requested}" if requested is not None else ""
        remedy = "Shorten it" if room < 1 else f"Ask for at most {room}, or shorten the prompt"
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, the prompt "
            f"has {prompt_len}{wanted}. {remedy}.",
            code="context_length_exceeded",
            param=param if room < 1 else limit_param,
        )
    if requested is not None:
        return requested
    return room if default is None else min(default, room)


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequestError for an id that is not in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"{param} holds {wrong}; token ids lie between 0 and {vocab_size - 1}",
            code="invalid_token_id",
            param=param,
        )


def _single(params: SamplingParams, choice: int) -> SamplingParams:
    if params.n == 1:
        return params
    seed = None if params.seed is None else seed_of_choice(params.seed, choice)
    return dataclasses.replace(params, n=1, seed=seed)


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in bias.items():
        # Anything longer than this many digits is no token id, and int() would take its time.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequestError(
                f'logit_bias has the key {key[:32]!r}; keys are token ids, such as "42"',
                code="invalid_value",
                param="logit_bias",
            )
        pairs.append((int(key), value))
    check_token_ids([token_id for token_id, _ in pairs], vocab_size, "logit_bias")
    return tuple(pairs)


def _grammar(response_format: ResponseFormat | None) -> Grammar | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Grammar(kind="json_object")
    if response_format.json_schema is None:
        raise InvalidRequestError(
            "response_format is json_schema without a schema; give one in "
            "response_format.json_schema.schema",
            code="missing_field",
            param="response_format.json_schema",
        )
    return Grammar(kind="json_schema", schema=_schema_text(response_format.json_schema.schema_))


def _schema_text(schema: dict[str, object]) -> str:
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise _bad_schema(str(error)) from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise _bad_schema(f"it has {len(text)} bytes, more than {MAX_SCHEMA_BYTES}; simplify it")
    return text


def _bad_schema(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The JSON schema cannot be used: {reason}",
        code="invalid_json_schema",
        param="response_format",
    )
