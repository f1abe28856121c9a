"""`shoal route` before servers of other engines, and requests to it as its users make them.

Knows nothing of what happens to the engines meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from engine_servers import EngineServer

KEY, MODEL = "sk-door", "smollm2"
_PATIENCE_S = 180.0
_LONGEST_S = 240.0


@dataclass(slots=True)
class Answer:
    """
    Attributes:
        end: how it finished, or what the client was told instead: the error's name.
        num_pieces: in which its text came; empty ones are none.
        ids: of answers that were in it.
        begun: something came before the error.
    """

    is_stream: bool
    end: str = ""
    num_pieces: int = 0
    ids: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    begun: bool = False
    end_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.end in ("stop", "length") and len(self.ids) == 1 and self.num_pieces > 0


class Door:
    """`shoal route`, before all of them."""

    def __init__(self, engines: list[EngineServer], log: Path) -> None:
        self._by_name = {each.name: each.engine for each in engines}
        self._names = {each.engine: each.name for each in engines}
        names = [f"--model-name={MODEL}={each.model}" for each in engines]
        upstreams = [f"--upstream={each.url}" for each in engines]
        shoal = [sys.executable, "-m", "shoal", "route", "--port", "0", "--api-key", KEY]
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [*shoal, *upstreams, *names], stdout=self._log, stderr=self._log
        )
        self.log = log
        self.url = ""

    async def ready(self) -> None:
        async def has_url() -> bool:
            found = re.search(r"ready +\S+ at (http://[\d.:]+)/v1", self.log.read_text())
            self.url = found.group(1) if found else ""
            return found is not None

        await until(has_url)

    async def replicas(self) -> dict[str, dict[str, Any]]:
        """By engine."""
        async with httpx.AsyncClient(timeout=10.0) as http:
            head = {"authorization": f"Bearer {KEY}"}
            answer = await http.get(f"{self.url}/admin/replicas", headers=head)
        return {self._by_name[name]: each for name, each in answer.json()["replicas"].items()}

    async def is_alive(self, engine: str) -> bool:
        return bool((await self.replicas())[engine]["alive"])

    async def num_tokens(self, engine: str) -> float:
        """That came from it, by /metrics."""
        made = await self.metrics("shoal_generation_tokens_total{")
        return next((n for label, n in made.items() if f'"{self._names[engine]}"' in label), 0.0)

    @contextlib.asynccontextmanager
    async def only(self, engine: str) -> AsyncIterator[None]:
        """Others are drained meanwhile: as long as it is in service, it gets all requests."""
        await self._order_others(engine, "drain")
        try:
            yield
        finally:
            await self._order_others(engine, "resume")

    async def _order_others(self, engine: str, what: str) -> None:
        head = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(timeout=10.0, headers=head) as http:
            for each, name in self._names.items():
                if each != engine:
                    answer = await http.post(f"{self.url}/admin/replicas/{name}/{what}")
                    answer.raise_for_status()

    async def metrics(self, name: str) -> dict[str, float]:
        """Of one metric, by its labels."""
        async with httpx.AsyncClient(timeout=10.0) as http:
            head = {"authorization": f"Bearer {KEY}"}
            text = (await http.get(f"{self.url}/metrics", headers=head)).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name))
        return {labels: float(value) for labels, value in lines}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._log.close()


async def ask(client: openai.AsyncOpenAI, number: int, max_tokens: int) -> Answer:
    """A chat, streamed and whole in turn; every third one a completion. What comes first is never
    the end: greedy, after words that ask for more."""
    answer = Answer(is_stream=number % 2 == 0)
    began_s = time.monotonic()
    said = f"Story number {number}. Once upon a time, there was"
    try:
        if number % 3 == 2:
            made: Any = client.completions.create(
                model=MODEL,
                prompt=said,
                max_tokens=max_tokens,
                temperature=0,
                stream=answer.is_stream,
            )
        else:
            made = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": said}],
                max_tokens=max_tokens,
                temperature=0,
                stream=answer.is_stream,
            )
        found = await made
        if answer.is_stream:
            async for chunk in found:
                _note(answer, chunk)
        else:
            _note(answer, found)
    except openai.APIStatusError as error:
        answer.end = f"{error.status_code} {error.code}"
    except openai.APIError as error:
        answer.end = f"{type(error).__name__} {error.code}"
    except httpx.HTTPError as error:
        answer.end = type(error).__name__
    answer.end_s = time.monotonic() - began_s
    return answer


def _note(answer: Answer, said: Any) -> None:
    answer.begun = True
    answer.ids.add(said.id)
    answer.models.add(said.model)
    for choice in said.choices:
        answer.end = choice.finish_reason or answer.end
        said_in = getattr(choice, "delta", None) or getattr(choice, "message", None)
        answer.num_pieces += bool(choice.text if said_in is None else said_in.content)


async def load(
    door: Door,
    count: int,
    *,
    at_once: int = 6,
    max_tokens: int = 32,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> list[Answer]:
    """
    Args:
        meanwhile: is done when a third of them have been asked.
    """
    client = openai.AsyncOpenAI(
        base_url=f"{door.url}/v1", api_key=KEY, max_retries=0, timeout=_LONGEST_S
    )
    seats, answers = asyncio.Semaphore(at_once), list[Answer]()
    beside: list[asyncio.Task[None]] = []

    async def one(number: int) -> None:
        async with seats:
            if meanwhile is not None and number == count // 3:
                beside.append(asyncio.create_task(_do(meanwhile)))
            answers.append(await ask(client, number, max_tokens))

    await asyncio.gather(*(one(number) for number in range(count)))
    await asyncio.gather(*beside)
    await client.close()
    return answers


async def _do(what: Callable[[], Awaitable[None]]) -> None:
    await what()


def told(answers: list[Answer]) -> dict[str, Any]:
    bad = [each for each in answers if not each.is_good]
    return {
        "requests": len(answers),
        "good": sum(each.is_good for each in answers),
        "mixed": sum(len(each.ids) > 1 for each in answers),
        "models": sorted({model for each in answers for model in each.models}),
        "errors_after_a_beginning": Counter(each.end or "none" for each in bad if each.begun),
        "errors_before_anything": Counter(each.end or "none" for each in bad if not each.begun),
        "longest_s": {
            kind: round(max((a.end_s for a in answers if a.is_stream == is_stream), default=0), 2)
            for kind, is_stream in (("streamed", True), ("whole", False))
        },
    }


async def is_not(what: Awaitable[bool]) -> bool:
    return not await what


async def until(what: Callable[[], Awaitable[bool]]) -> float:
    """Seconds that it took."""
    began_s = time.monotonic()
    while not await what():
        waited_s = time.monotonic() - began_s
        if waited_s > _PATIENCE_S:
            raise RuntimeError(f"{what.__qualname__} did not hold within {_PATIENCE_S:g} s")
        await asyncio.sleep(0.05)
    return round(time.monotonic() - began_s, 2)
