"""Whether a request may come in, and the sequence it becomes. Knows nothing of Steps."""

from __future__ import annotations

from shoal.core.errors import InvalidRequestError, RequestError
from shoal.core.request import ErrorInfo, FinishReason, GenerateRequest
from shoal.engine.blocks import root_name
from shoal.engine.config import EngineConfig
from shoal.engine.sequence import Sequence


def refuse_if_wrong(request: GenerateRequest, config: EngineConfig) -> None:
    """Raise if no engine of this config could ever run it.

    Raises:
        InvalidRequestError: what is wrong with it.
    """
    if not request.prompt_ids:
        raise InvalidRequestError(
            "the prompt is empty; it needs at least one token",
            code="empty_prompt",
            param="prompt",
        )
    if len(request.prompt_ids) >= config.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(request.prompt_ids)} tokens; this model's context is "
            f"{config.max_model_len} tokens, prompt and output together; shorten the prompt",
            code="context_length_exceeded",
            param="prompt",
        )
    token_ids = request.prompt_ids
    if request.output_ids:
        token_ids = (*token_ids, *request.output_ids)
    if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
        raise InvalidRequestError(
            f"token ids lie between {min(token_ids)} and {max(token_ids)}; this model's "
            f"vocabulary is 0 to {config.vocab_size - 1}",
            code="invalid_token_id",
            param="prompt",
        )


def new_sequence(
    request: GenerateRequest, config: EngineConfig, *, arrival: int, now: float
) -> Sequence:
    """The sequence of a request; `arrival` counts them."""
    max_tokens = request.sampling.max_tokens or config.max_model_len
    return Sequence(
        request,
        arrival=arrival,
        now=now,
        max_len=min(len(request.prompt_ids) + max_tokens, config.max_model_len),
        eos_token_ids=config.eos_token_ids,
        root=root_name(config.model_digest, request.salt),
    )


def already_over(sequence: Sequence) -> FinishReason | None:
    """Whether a continued request had already reached its end when it was cut."""
    if sequence.num_output and sequence.stops_at(sequence.token_ids[-1]):
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_len else None


def grammar_failure(error: Exception) -> ErrorInfo:
    """What a request hears of a schema that could not be followed."""
    if isinstance(error, RequestError):
        return ErrorInfo.of(error)
    return ErrorInfo.of(RequestError(f"following the schema failed: {error}"))
