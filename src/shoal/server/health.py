"""/health (the process answers), /ready (it can generate) and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.responses import Response

from shoal.core.request import ErrorInfo, GenerateRequest, SamplingParams
from shoal.observe import CONTENT_TYPE
from shoal.server.config import EdgeContext, ServerContext
from shoal.server.errors import error_response


def health_routes(context: EdgeContext, why_not: Callable[[], Awaitable[str | None]]) -> APIRouter:
    """The endpoints, for one app.

    Args:
        why_not: why it is not ready; None: it is.
    """
    routes = APIRouter()

    @routes.get("/health", response_class=Response)
    async def health() -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    @routes.get("/ready", response_class=Response)
    async def ready() -> Response:
        reason = await why_not()
        if reason is None:
            return Response(b'{"status":"ready"}', media_type="application/json")
        return error_response(
            ErrorInfo(status=503, code="not_ready", message=reason, retry_after_s=1.0)
        )

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return routes


@dataclass(frozen=True, slots=True)
class _Verdict:
    reason: str | None
    at_s: float


class Readiness:
    """Whether tokens come: one came lately, or a probe for a single token just got it.

    One probe at a time, however many ask; its verdict holds for `probe_ttl_s`.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._verdict: _Verdict | None = None
        self._probing: asyncio.Task[_Verdict] | None = None
        self._num_probes = 0

    async def why_not(self) -> str | None:
        """None if it can generate; else the reason."""
        router, config = self._context.router, self._context.config
        if not router.ready:
            return "no replica is ready, or the server is draining"
        now = self._context.clock.now()
        if router.last_token_s is not None and now - router.last_token_s < config.ready_window_s:
            return None
        if self._verdict is None or now - self._verdict.at_s >= config.probe_ttl_s:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe())
            # Shielded: whoever asked may hang up, others wait for the same probe.
            self._verdict = await asyncio.shield(self._probing)
        return self._verdict.reason

    async def _probe(self) -> _Verdict:
        reason: str | None = "the probe ended without a token"
        try:
            async with asyncio.timeout(self._context.config.probe_timeout_s):
                async with aclosing(self._context.router.generate(self._request())) as outputs:
                    async for output in outputs:
                        if output.token_ids:
                            reason = None
                        elif output.error is not None:
                            reason = output.error.message
        except TimeoutError:
            reason = f"no token within {self._context.config.probe_timeout_s:g} s"
        return _Verdict(reason, self._context.clock.now())

    def _request(self) -> GenerateRequest:
        self._num_probes += 1
        return GenerateRequest(
            request_id=f"ready-probe-{self._num_probes}",
            prompt_ids=(self._context.tokenizer.bos_token_id or 0,),
            sampling=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            priority=_FIRST,
        )


_FIRST = -(2**31)
