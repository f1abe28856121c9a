"""Streams of a server as their users see them: each piece with the time it came at.

Of an OpenAI-compatible server alone; knows nothing of replicas or of what is done to them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """
    Attributes:
        seed: of sampling at temperature 1; None: greedy.
    """

    prompt: str
    max_tokens: int
    seed: int | None = None

    def body(self, model: str) -> dict[str, Any]:
        sampling = (
            {"temperature": 0.0} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        )
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
            **sampling,
        }


@dataclass(slots=True)
class Told:
    """
    Attributes:
        status: of HTTP; 0: there was no answer.
        times_s: of pieces with text, after the request was sent.
        finish: None: the stream broke off, or ended in `error`.
        retry_after_s: that a refusal named.
    """

    status: int = 0
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    end_s: float = 0.0
    retry_after_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.times_s[0] if self.times_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]


def client(api_key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    headers = {"Authorization": f"Bearer {api_key}"}
    return httpx.AsyncClient(timeout=600.0, limits=limits, headers=headers)


async def told(http: httpx.AsyncClient, url: str, model: str, ask: Ask) -> Told:
    """What a server says to a request, whatever that is."""
    found, start_s = Told(), time.perf_counter()
    try:
        async with http.stream("POST", f"{url}/v1/completions", json=ask.body(model)) as answer:
            found.status = answer.status_code
            if answer.status_code != 200:
                await answer.aread()
                found.error = answer.text[:200]
                after = answer.headers.get("retry-after")
                found.retry_after_s = None if after is None else float(after)
            else:
                async for line in answer.aiter_lines():
                    _hear(found, line, time.perf_counter() - start_s)
    except httpx.HTTPError as error:
        found.error = f"{type(error).__name__}: {error}"
    found.end_s = time.perf_counter() - start_s
    return found


async def served_model(http: httpx.AsyncClient, url: str) -> str:
    """The first that a server names."""
    answer = await http.get(f"{url}/v1/models")
    answer.raise_for_status()
    name: str = answer.json()["data"][0]["id"]
    return name


async def at_times(
    http: httpx.AsyncClient, url: str, asks: Sequence[tuple[float, Ask]]
) -> list[Told]:
    """Each request at its appointed time, in seconds from now, whatever comes back."""
    model = await served_model(http, url)
    start_s = time.perf_counter()

    async def one(at_s: float, ask: Ask) -> Told:
        await asyncio.sleep(max(start_s + at_s - time.perf_counter(), 0.0))
        return await told(http, url, model, ask)

    return await asyncio.gather(*(one(at_s, ask) for at_s, ask in asks))


def _hear(found: Told, line: str, now_s: float) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line[len("data: ") :])
    if "error" in event:
        found.error = event["error"]["message"]
        return
    for choice in event["choices"]:
        if choice["text"]:
            found.text += choice["text"]
            found.times_s.append(now_s)
        found.finish = choice["finish_reason"] or found.finish
