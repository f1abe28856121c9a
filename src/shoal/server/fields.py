"""Which request fields shoal knows but does not support, and what may be ignored.

A field is never dropped in silence: it is supported, or it says nothing (null, or the value
that means «off»), or the request is refused with a 400 that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shoal.core.errors import InvalidRequestError

NoOps = Mapping[str, tuple[object, ...]]
"""Unsupported field → the values, besides null, that ask for nothing."""

_VLLM: NoOps = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "documents": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}

UNSUPPORTED_COMPLETION: NoOps = {**_VLLM, "suffix": ("",)}

UNSUPPORTED_CHAT: NoOps = {
    **_VLLM,
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True, False),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

UNSUPPORTED_MESSAGE: NoOps = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
}

_MEDIA = ("audio_url", "file", "image_url", "input_audio", "video_url")
UNSUPPORTED_PART: NoOps = dict.fromkeys(_MEDIA, ())


def without_no_ops(
    body: Mapping[str, Any], known: Collection[str], unsupported: NoOps
) -> dict[str, Any]:
    """The body less the unsupported fields that ask for nothing.

    Raises:
        InvalidRequestError: an unsupported field that asks for something
            (`unsupported_parameter`), or one nobody knows (`unknown_parameter`).
    """
    kept = {}
    for name, value in body.items():
        if name in known:
            kept[name] = value
        elif name not in unsupported:
            shown = name if len(name) <= 64 else name[:64] + "..."
            raise InvalidRequestError(
                f"Unknown field {shown!r}; /openapi.json lists what is accepted.",
                code="unknown_parameter",
                param=shown,
            )
        elif value is not None and value not in unsupported[name]:
            raise InvalidRequestError(
                f"{name} is not supported by shoal yet; leave it out.",
                code="unsupported_parameter",
                param=name,
            )
    return kept
