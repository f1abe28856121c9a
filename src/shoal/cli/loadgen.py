"""Open-loop load on an OpenAI-compatible server: send on time whatever comes back, and note
when each piece of each answer came.

Latencies count from the *scheduled* time, so a client or server that falls behind is not
flattered by requests it delayed (coordinated omission). Knows nothing of flags, traces'
formats or how results are summed up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from shoal.core.errors import ConfigError
from shoal.core.workload import Arrival, Workload

ErrorKind = Literal["refused", "http", "connection", "timeout", "truncated", "stream"]

# Prompts are made ahead of their time: long ones take milliseconds.
_PREPARED_AHEAD = 64
_SHOWN = 80


@dataclass(slots=True)
class RequestRecord:
    """One request, as it was seen; times in seconds since the load began.

    Attributes:
        scheduled_s, sent_s, end_s: when it was due, sent, and over.
        waited_for_slot: the concurrency limit held it back.
        chunk_times_s: when each piece of text came.
        prompt_tokens, output_tokens: as the server counted; None: it did not say.
        error: what kind of failure; None: it ended as it should.
    """

    scheduled_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    waited_for_slot: bool = False
    chunk_times_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: ErrorKind | None = None
    status: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """How to send.

    Attributes:
        chat: /v1/chat/completions instead of /v1/completions.
        ignore_eos: ask for outputs of exactly the workload's lengths.
        max_concurrency: requests under way at most; None: no limit.
        timeout_s: for one whole request.
    """

    model: str
    chat: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    max_concurrency: int | None = None
    timeout_s: float = 600.0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, prompt: str | list[int], output_tokens: int) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.chat:
            return body | {"messages": [{"role": "user", "content": prompt}]}
        return body | {"prompt": prompt}


async def first_model(client: httpx.AsyncClient) -> str:
    """The model the server names first.

    Raises:
        ConfigError: it cannot be reached, or it names none.
    """
    try:
        reply = await client.get("/v1/models", timeout=30)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"no model name from {str(client.base_url).rstrip('/')}/v1/models "
            f"({error or type(error).__name__}); "
            f"check the URL and --api-key, or give --model"
        ) from error


async def warm_up(client: httpx.AsyncClient, config: LoadConfig) -> None:
    """One short request, so that a server that cannot serve the load says so before it.

    Raises:
        ConfigError: it failed.
    """
    record = RequestRecord(scheduled_s=0.0)
    body = json.dumps(config.body("Hello", 2)).encode()
    await _timed_send(client, config, body, record, time.perf_counter())
    if record.error is None:
        return
    remedy = "check the URL, --model and --api-key"
    if record.status in {400, 422} and "ignore_eos" in record.message:
        remedy = "the server does not know ignore_eos: add --no-ignore-eos (lengths may differ)"
    status = f" {record.status}" if record.status else ""
    raise ConfigError(f"a first request failed: {record.error}{status}: {record.message}; {remedy}")


async def run_load(
    client: httpx.AsyncClient,
    config: LoadConfig,
    workload: Workload,
    prompt_of: Callable[[int, Arrival], str | list[int]],
    records: list[RequestRecord],
) -> None:
    """Send the workload and wait for the last answer.

    Each request's record is added to `records` when it is over: whoever cancels this has
    what was measured so far.
    """
    prepared: asyncio.Queue[bytes] = asyncio.Queue(_PREPARED_AHEAD)
    slots = asyncio.Semaphore(config.max_concurrency) if config.max_concurrency else None

    def encode(index: int, arrival: Arrival) -> bytes:
        prompt = prompt_of(index, arrival)
        return json.dumps(config.body(prompt, arrival.output_tokens)).encode()

    async def prepare() -> None:
        for index, arrival in enumerate(workload.arrivals):
            await prepared.put(await asyncio.to_thread(encode, index, arrival))

    async def one(body: bytes, record: RequestRecord, origin_s: float) -> None:
        if slots is None:
            await _timed_send(client, config, body, record, origin_s)
        else:
            record.waited_for_slot = slots.locked()
            async with slots:
                await _timed_send(client, config, body, record, origin_s)
        records.append(record)

    async with asyncio.TaskGroup() as tasks:
        preparing = tasks.create_task(prepare())
        while not (prepared.full() or preparing.done()):
            await asyncio.sleep(0.001)
        origin_s = time.perf_counter()
        for arrival in workload.arrivals:
            body = await prepared.get()
            delay_s = origin_s + arrival.arrival_s - time.perf_counter()
            await asyncio.sleep(max(0.0, delay_s))
            tasks.create_task(one(body, RequestRecord(arrival.arrival_s), origin_s))


async def _timed_send(
    client: httpx.AsyncClient,
    config: LoadConfig,
    body: bytes,
    record: RequestRecord,
    origin_s: float,
) -> None:
    record.sent_s = time.perf_counter() - origin_s
    try:
        async with asyncio.timeout(config.timeout_s):
            await _send(client, config, body, record, origin_s)
    except TimeoutError:
        record.error, record.message = "timeout", f"not done after {config.timeout_s:g} s"
    record.end_s = time.perf_counter() - origin_s


async def _send(
    client: httpx.AsyncClient,
    config: LoadConfig,
    body: bytes,
    record: RequestRecord,
    origin_s: float,
) -> None:
    headers = {"Content-Type": "application/json"}
    try:
        async with client.stream("POST", config.path, content=body, headers=headers) as response:
            record.status = response.status_code
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                record.error = "refused" if response.status_code == 429 else "http"
                record.message = _error_message(text)
                return
            await _read_stream(response, record, origin_s)
    except httpx.ConnectError as error:
        record.error, record.message = "connection", str(error)
    except httpx.TimeoutException as error:
        record.error, record.message = "timeout", type(error).__name__
    except httpx.HTTPError as error:
        record.error, record.message = "truncated", str(error) or type(error).__name__


async def _read_stream(response: httpx.Response, record: RequestRecord, origin_s: float) -> None:
    finished = False
    async for event in _events(response):
        now_s = time.perf_counter() - origin_s
        if event.get("error"):
            record.error, record.message = "stream", _error_message(json.dumps(event))
            return
        try:
            finished = _note_event(record, event, now_s) or finished
        except (AttributeError, TypeError):
            record.error, record.message = "stream", f"no such event: {str(event)[:_SHOWN]}"
            return
    if not finished:
        record.error, record.message = "truncated", "the stream ended without a finish_reason"


def _note_event(record: RequestRecord, event: dict[str, Any], now_s: float) -> bool:
    """Whether the output ends with it.

    Raises:
        AttributeError, TypeError: it is none of OpenAI's.
    """
    if usage := event.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.output_tokens = usage.get("completion_tokens")
    finished = False
    for choice in event.get("choices") or ():
        ends = choice.get("finish_reason") is not None
        # An output whose tokens have no text has come when it is over.
        if _has_text(choice) or (ends and not record.chunk_times_s):
            record.chunk_times_s.append(now_s)
        finished = finished or ends
    return finished


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for received in response.aiter_bytes():
        # Not aiter_lines: it also splits at U+2028 and the like, which JSON may hold.
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data or data == b"[DONE]":
                continue
            try:
                event = json.loads(data)
            except ValueError as error:
                raise httpx.DecodingError(f"an event that is not JSON: {data[:80]!r}") from error
            if isinstance(event, dict):
                yield event


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def _error_message(text: str) -> str:
    """The message of OpenAI's error shape, or what there is."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = text
    return " ".join(str(message).split())[:300]
