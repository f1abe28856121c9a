"""`ChatTemplate`: messages to prompt text, by the Jinja template a model brings.

Rendering follows transformers' `apply_chat_template`. A template is code from the model's
author: it runs in Jinja's sandbox, and loops, calls and sizes are counted, so that a hostile
one ends with an error instead of a hang. Knows nothing of tokenizers or HTTP.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from shoal.core.errors import InvalidRequestError, ModelError
from shoal.text.template_limits import BudgetExceeded
from shoal.text.template_sandbox import Rejected, TemplateSandbox

MAX_TEMPLATE_CHARS = 1_000_000


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: variables such as "bos_token" that the template may use.

    Raises:
        ModelError: not a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(
                f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}; "
                "pass another one with --chat-template FILE"
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox = TemplateSandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise ModelError(
                f"the chat template does not compile: {error}; "
                "mend it, or pass another one with --chat-template FILE"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Encode it with `add_special_tokens=False`: templates write their own BOS.

        Args:
            messages: plain JSON values, at least "role" and "content" each.
            now: what the template's `strftime_now` tells; without it the template has no such
                function (most then show a date of their own).
            add_generation_prompt: end with what begins an answer of the assistant.
            continue_final_message: end inside the final message, for the model to carry on.
            template_kwargs: more variables for the template (such as enable_thinking).

        Raises:
            InvalidRequestError: the template rejects these messages.
            ModelError: the template does what templates must not do.
        """
        if add_generation_prompt and continue_final_message:
            raise _invalid(
                "add_generation_prompt and continue_final_message exclude each other; "
                "set add_generation_prompt to false",
                param="continue_final_message",
            )
        chat = copy.deepcopy(list(messages))
        final_text = _mark_final_message(chat) if continue_final_message else ""
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": chat,
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._render(variables, now)
        return _cut_at_mark(rendered, final_text) if continue_final_message else rendered

    def _render(self, variables: dict[str, Any], now: datetime | None) -> str:
        try:
            return self._sandbox.render(self._template, variables, now)
        except Rejected as error:
            raise _invalid(f"the chat template rejects these messages: {error}") from error
        except (jinja2.exceptions.SecurityError, BudgetExceeded) as error:
            raise ModelError(
                f"the chat template was stopped: {error}; pass another one with "
                "--chat-template FILE"
            ) from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # What a template does with messages it was not written for (content missing or null).
            raise _invalid(
                f"the chat template cannot render these messages: {error}; "
                "check their roles and contents"
            ) from error
        except (AttributeError, RecursionError) as error:
            raise ModelError(f"the chat template is broken: {error}") from error


_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def _mark_final_message(chat: list[Any]) -> str:
    """Appends a mark to the final message's text, and returns that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _MARK
        return content
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _MARK
                return text
    raise _invalid(
        "continue_final_message needs a final message with text to continue",
        param="continue_final_message",
    )


def _cut_at_mark(rendered: str, final_text: str) -> str:
    position = rendered.rfind(_MARK.strip())
    if position < 0 or final_text.strip() not in rendered:
        raise _invalid(
            "continue_final_message is set, but the chat template does not show the final message "
            "whole; add_generation_prompt begins a new one",
            param="continue_final_message",
        )
    if rendered.startswith(_MARK, position):
        return rendered[:position]
    # The template trims messages, so the text before the mark is trimmed too.
    return rendered[:position].rstrip()


def _invalid(message: str, *, param: str = "messages") -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_messages", param=param)
