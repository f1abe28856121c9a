"""A server without a model: the real app behind real uvicorn, a router that plays a script."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from shoal.core.clock import Clock, MonotonicClock
from shoal.core.errors import RequestError
from shoal.core.request import ErrorInfo, FinishReason, GenerateRequest, Output, TokenLogprobs
from shoal.core.stats import EngineInfo, EngineStats, EntranceStats, HedgeStats, ReplicaView
from shoal.observe import ServingMetrics
from shoal.server import ServerConfig, create_app
from shoal.text import Tokenizer, load_tokenizer
from text_models import SMALL_TEMPLATE, byte_level_metadata, gguf_bytes

EOS = 260
MODEL = "tiny"
MAX_MODEL_LEN = 512


def tiny_tokenizer() -> Tokenizer:
    """A token per byte but for "he", "hel" and " he"; a chat template."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        path.write_bytes(gguf_bytes(byte_level_metadata()))
        return load_tokenizer(path, chat_template=SMALL_TEMPLATE)


@dataclass
class FakeRouter:
    """Answers every request with the same tokens, one a turn, and takes notes.

    Attributes:
        answer: output ids; past their end, EOS.
        delay_s: before every token.
        may_go_on: asked before every token until it says yes; None: always.
        refusal: the first and only output.
        full: why there is no room.
        failure: the output in place of the token at position `failure_at`.
        left: ids of requests whose stream was closed before its end.
        num_taken: outputs that the server took without its reader.
    """

    answer: tuple[int, ...] = tuple(b"Hi there")
    delay_s: float = 0.0
    may_go_on: Callable[[], bool] | None = None
    refusal: ErrorInfo | None = None
    full: RequestError | None = None
    failure: ErrorInfo | None = None
    failure_at: int = 0
    ready: bool = True
    info: EngineInfo | None = field(
        default_factory=lambda: EngineInfo(
            max_model_len=MAX_MODEL_LEN,
            num_kv_blocks=100,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_waiting=16,
            device="cpu",
            dtype="float32",
        )
    )
    last_token_s: float | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    num_running: int = 0
    num_taken: int = 0

    @property
    def hedges(self) -> HedgeStats:
        return HedgeStats()

    @property
    def entrance(self) -> EntranceStats:
        return EntranceStats()

    def why_full(self, salt: str, priority: int) -> RequestError | None:
        return self.full

    def replicas(self) -> Mapping[str, ReplicaView]:
        return {"replica-0": ReplicaView(True, False, self.num_running)}

    def stats(self) -> Mapping[str, EngineStats]:
        return {"replica-0": EngineStats(num_running=self.num_running, num_blocks=8)}

    async def generate(
        self, request: GenerateRequest, take: Callable[[Output, float], bool] | None = None
    ) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self.num_running += 1
        ended = False
        try:
            for output in self._outputs(request):
                await asyncio.sleep(self.delay_s)
                while self.may_go_on is not None and not self.may_go_on():
                    await asyncio.sleep(0.002)
                ended = output.finish is not None
                if take is not None and take(output, time.monotonic()):
                    self.num_taken += 1
                else:
                    yield output
        finally:
            self.num_running -= 1
            if not ended:
                self.left.append(request.request_id)

    def _outputs(self, request: GenerateRequest) -> Iterator[Output]:
        if self.refusal is not None:
            yield Output(request_id=request.request_id, finish="error", error=self.refusal)
            return
        params = request.sampling
        assert params.max_tokens is not None, "the server always says how many"
        for position in range(len(request.output_ids), params.max_tokens):
            if self.failure is not None and position == self.failure_at:
                yield Output(request_id=request.request_id, finish="error", error=self.failure)
                return
            in_answer = position < len(self.answer)
            token_id = self.answer[position] if in_answer else EOS
            stops = not in_answer and not params.ignore_eos
            finish: FinishReason | None = "stop" if stops else None
            if finish is None and position == params.max_tokens - 1:
                finish = "length"
            first = position == len(request.output_ids)
            yield Output(
                request_id=request.request_id,
                token_ids=(token_id,),
                logprobs=() if params.logprobs is None else (_logprobs(token_id, params.logprobs),),
                prompt_logprobs=tuple(
                    _logprobs(prompt_id, params.prompt_logprobs)
                    for prompt_id in request.prompt_ids[1:]
                )
                if first and params.prompt_logprobs is not None
                else (),
                finish=finish,
                stop_token_id=token_id if stops else None,
                num_cached_tokens=3 if first else None,
            )
            if finish is not None:
                return


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The chosen token second, the token after it in the vocabulary first."""
    candidates = ((token_id + 1, -0.25), (token_id, -1.5), (0, float("-inf")))
    return TokenLogprobs(token_id, -1.5, 2, candidates[:num_top])


def make_app(
    router: FakeRouter, *, clock: Clock | None = None, metrics: Any = None, **config: Any
) -> FastAPI:
    settings: dict[str, Any] = {"served_model_names": (MODEL, "org/alias"), **config}
    return create_app(
        config=ServerConfig(**settings),
        router=router,
        tokenizer=tiny_tokenizer(),
        metrics=metrics or ServingMetrics(),
        clock=clock or MonotonicClock(),
        rng=random.Random(0),
        wall_clock=lambda: 1_700_000_000.5,
    )


def ask(
    router: FakeRouter, method: str, path: str, body: Any = None, **config: Any
) -> httpx.Response:
    """One request to a fresh app over `router`, without a socket."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(router, **config))
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as http:
            return await http.request(method, path, json=body)

    return asyncio.run(send())


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The app behind uvicorn on a free port; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"
        listener.close()


@contextlib.contextmanager
def client(router: FakeRouter, **config: Any) -> Iterator[httpx.Client]:
    """A client of a fresh app over `router`."""
    with (
        running(make_app(router, **config)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield http


def wait_until(condition: Any, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not so within {limit_s} s"
        time.sleep(0.005)
