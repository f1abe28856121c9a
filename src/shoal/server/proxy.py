"""OpenAI's endpoints where text goes to upstreams as it is: read, checked, placed, passed back.

    body ─▶ ProxiedRequest ─▶ router ─▶ upstream
                                │
    client ◀─ its bytes ◀─ ProxiedOutput

The paths are fixed, and of what a client sent only the JSON fields go on: no header does. Knows
nothing of tokens.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.core.errors import InvalidRequestError, RequestError
from shoal.core.request import ErrorInfo, SamplingParams
from shoal.router.upstream.bodies import COMMITTED, read_fields, value_of
from shoal.router.upstream.records import Call, ProxiedOutput, ProxiedRequest, stand_in_ids
from shoal.server.config import EdgeContext
from shoal.server.cork import Corked
from shoal.server.errors import error_response
from shoal.server.hang_up import unless_hung_up
from shoal.server.proxy_output import checked
from shoal.server.proxy_stream import ProxiedStream
from shoal.server.respond import check_model, request_label, tenant

PROMPTS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
}
"""Endpoint → the field that holds its prompt."""
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """What responses are counted under, as of a route."""

    path: str


class ProxyEndpoints:
    """Answers what is posted to these paths.

    Not routes of an app: finding one, and what surrounds it, would cost as much as all else here.
    """

    def __init__(self, context: EdgeContext) -> None:
        self._context = context
        self._endpoints = {path: _Endpoint(path) for path in PROMPTS}
        self._num_asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._endpoints[scope["path"]]
        try:
            await self._answer(scope, receive, send)
        except RequestError as error:
            await error_response(ErrorInfo.of(error))(scope, receive, send)
        except HTTPException as error:  # of a body that is too long
            info = ErrorInfo(
                status=error.status_code, code="request_too_large", message=str(error.detail)
            )
            await error_response(info)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _whole_body(receive)
        if body is None:
            return  # nobody is there to read an answer
        self._num_asked += 1
        request, context = Request(scope), self._context
        proxied = read_request(body, request, context, f"proxied-{self._num_asked}")
        answer = (
            ProxiedStream(proxied, context, request_label(request))
            if proxied.call.is_stream
            else _Answer(proxied, context)
        )
        await answer(scope, receive, send)


async def _whole_body(receive: Receive) -> bytes | None:
    """None: the client hung up in the middle of it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def read_request(
    body: bytes, request: Request, context: EdgeContext, request_id: str
) -> ProxiedRequest:
    """What a client asks for.

    Raises:
        RequestError: it cannot be passed on.
    """
    path = request.scope["path"]
    fields = read_fields(body)
    field = PROMPTS[path]
    if field not in fields:
        raise InvalidRequestError(
            f"the body has no {field}; send one", code="missing_field", param=field
        )
    model = value_of(fields, "model", str) or context.config.served_model_names[0]
    check_model(model, context)
    num_choices = value_of(fields, "n", int) or 1
    if not 1 <= num_choices <= _MAX_CHOICES:
        raise InvalidRequestError(
            f"n is {num_choices}; it must lie between 1 and {_MAX_CHOICES}",
            code="invalid_value",
            param="n",
        )
    num_choices *= _num_prompts(path, fields)
    is_stream = value_of(fields, "stream", bool) or False
    call = Call(
        path=path,
        fields=fields,
        model=model,
        is_stream=is_stream,
        num_choices=num_choices,
        may_continue=is_stream and num_choices == 1 and _may_continue(path, fields),
        shows_ids=value_of(fields, "return_token_ids", bool) or False,
    )
    return ProxiedRequest(
        request_id=request_id,
        prompt_ids=stand_in_ids(bytes(fields[field])),
        sampling=SamplingParams(max_tokens=_max_tokens(fields), seed=_seed(fields, context)),
        priority=value_of(fields, "priority", int) or 0,
        timeout_s=context.config.request_timeout_s,
        salt=tenant(request),
        call=call,
    )


def _num_prompts(path: str, fields: dict[str, msgspec.Raw]) -> int:
    """Whose answers come in one stream."""
    if path != "/v1/completions" or bytes(fields["prompt"])[:1] != b"[":
        return 1
    prompts = value_of(fields, "prompt", list)
    # One may be spelled as a list of token ids.
    return max(len(prompts), 1) if isinstance(next(iter(prompts), 0), (str, list)) else 1


def _may_continue(path: str, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether another upstream could take up its stream, to the letter."""
    if path == "/v1/responses" or COMMITTED in fields:
        return False
    # With echo, what follows a committed token is not known from the events alone.
    is_one = path != "/v1/completions" or bytes(fields["prompt"])[:1] == b'"'
    return is_one and not value_of(fields, "echo", bool)


def _max_tokens(fields: dict[str, msgspec.Raw]) -> int | None:
    for name in _LIMITS:
        limit: int | None = value_of(fields, name, int)
        if limit is not None:
            return limit if limit >= 1 else None
    return None


def _seed(fields: dict[str, msgspec.Raw], context: EdgeContext) -> int:
    """The client's, or one that is drawn here: a request that lacks it would be made anew."""
    seed: int | None = value_of(fields, "seed", int)
    return context.rng.getrandbits(63) if seed is None else seed % 2**64


class _Answer:
    """A whole answer, with the status that the upstream gave it."""

    def __init__(self, request: ProxiedRequest, context: EdgeContext) -> None:
        self._request, self._context = request, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            output = await self._output()
            response = Response(output.data, output.status, media_type="application/json")
            with Corked(scope):
                await response(scope, receive, send)

        await unless_hung_up(scope, receive, work())

    async def _output(self) -> ProxiedOutput:
        context, request = self._context, self._request
        timer = context.metrics.completion(len(request.prompt_ids), context.clock.now())
        reason = "cancelled"
        try:
            async with aclosing(context.router.generate(request)) as outputs:
                found = checked(await anext(outputs))
            timer.answered(len(found.token_ids))
            reason = f"upstream_{found.status}" if found.is_refusal else found.finish or reason
        except RequestError as error:
            reason = error.code
            raise
        finally:
            timer.finished(reason, context.clock.now())
        request.call.backlog.took(len(found.data))
        return found
