"""`shoal route` before servers of other engines, unmodified: what their users see when one fails.

    python benchmarks/other_engines.py --model smollm2.gguf --environments DIR --output FILE

Three engines (`benchmarks/engine_servers.py`) serve the same weights on this CPU. Each scenario is
requests of the `openai` client, streamed and whole in turn, some at a time:

    calm       nothing happens: who answers what, under which name
    killed     an engine is killed (-9) in the middle of them, and started again
    stopped    an engine is stopped (SIGSTOP) for a while
    key        an engine wants a key that the door has not got

An answer is mixed if two answers' ids are in it; it has ended if it says how it finished.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from engine_servers import EngineServer, EngineServers
from lab_session import conditions, keep

KEY, MODEL = "sk-door", "smollm2"
_PATIENCE_S = 180.0
_LONGEST_S = 240.0


@dataclass(slots=True)
class Answer:
    """
    Attributes:
        end: how it finished, or what the client was told instead: the error's name.
        ids: of answers that were in it.
        begun: something came before the error.
    """

    is_stream: bool
    end: str = ""
    ids: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    begun: bool = False
    end_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.end in ("stop", "length") and len(self.ids) == 1


class Door:
    """`shoal route`, before all of them."""

    def __init__(self, engines: list[EngineServer], log: Path) -> None:
        self._by_name = {each.name: each.engine for each in engines}
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

        await _until(has_url)

    async def replicas(self) -> dict[str, dict[str, Any]]:
        """By engine."""
        async with httpx.AsyncClient(timeout=10.0) as http:
            head = {"authorization": f"Bearer {KEY}"}
            answer = await http.get(f"{self.url}/admin/replicas", headers=head)
        return {self._by_name[name]: each for name, each in answer.json()["replicas"].items()}

    async def is_alive(self, engine: str) -> bool:
        return bool((await self.replicas())[engine]["alive"])

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
    """A chat, streamed and whole in turn; every third one a completion."""
    answer = Answer(is_stream=number % 2 == 0)
    began_s = time.monotonic()
    said = f"Tell me story number {number}."
    try:
        if number % 3 == 2:
            made: Any = client.completions.create(
                model=MODEL, prompt=said, max_tokens=max_tokens, stream=answer.is_stream
            )
        else:
            made = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": said}],
                max_tokens=max_tokens,
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


async def calm(door: Door, engines: list[EngineServer]) -> dict[str, Any]:
    await load(door, 12)
    finished, made = await _counted(door)
    found = told(await load(door, 36))
    finished_after, made_after = await _counted(door)
    views = await door.replicas()
    return {
        **found,
        "counted_by_metrics": finished_after - finished,
        "output_tokens": {each.engine: made_after[each.name] - made[each.name] for each in engines},
        "replicas": {each.engine: _view(views[each.engine]) for each in engines},
    }


async def _counted(door: Door) -> tuple[float, dict[str, float]]:
    """Requests that finished, and output tokens of each upstream, by /metrics."""
    finished = sum((await door.metrics("shoal_requests_finished_total{")).values())
    made = await door.metrics("shoal_generation_tokens_total{")
    return finished, {labels.split('"')[1]: count for labels, count in made.items()}


def _view(view: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in view.items() if not isinstance(each, (dict, list))}


async def killed(door: Door, engine: EngineServer) -> dict[str, Any]:
    times: dict[str, float] = {}

    async def kill() -> None:
        times["requests_there"] = await _requests_at(door, engine.engine)
        engine.stop()
        times["found_dead_s"] = await _until(lambda: _not(door.is_alive(engine.engine)))

    found = told(await load(door, 18, at_once=9, meanwhile=kill))
    engine.start()
    times["in_service_again_s"] = await _until(lambda: door.is_alive(engine.engine))
    return {**found, **times}


async def stopped(door: Door, engine: EngineServer) -> dict[str, Any]:
    times: dict[str, float] = {}

    async def stop() -> None:
        times["requests_there"] = await _requests_at(door, engine.engine)
        engine.send(signal.SIGSTOP)

    found = told(await load(door, 18, at_once=9, meanwhile=stop))
    times["found_dead_s"] = await _until(lambda: _not(door.is_alive(engine.engine)))
    engine.send(signal.SIGCONT)
    times["in_service_again_s"] = await _until(lambda: door.is_alive(engine.engine))
    return {**found, **times}


async def wrong_key(door: Door, engine: EngineServer) -> dict[str, Any]:
    """Of llama.cpp's server, which wants one from now on."""
    engine.stop()
    await _until(lambda: _not(door.is_alive(engine.engine)))
    engine.keys = ["sk-engine"]
    engine.start()

    async def says_why() -> bool:
        return "401" in door.log.read_text()

    waited_s = await _until(says_why)
    found = told(await load(door, 12))
    lines = [line for line in door.log.read_text().splitlines() if "401" in line]
    is_used = await door.is_alive(engine.engine)
    engine.stop()
    engine.keys = []
    engine.start()
    again_s = await _until(lambda: door.is_alive(engine.engine))
    return {
        **found,
        "said_after_s": waited_s,
        "log": lines[0][:300],
        "was_used": is_used,
        "in_service_again_s": again_s,
    }


async def _requests_at(door: Door, engine: str) -> int:
    """Once it has some; none, if the door gave it none for a while."""
    for _ in range(100):
        if count := int((await door.replicas())[engine]["requests"]):
            return count
        await asyncio.sleep(0.05)
    return 0


async def _not(what: Awaitable[bool]) -> bool:
    return not await what


async def _until(what: Callable[[], Awaitable[bool]]) -> float:
    """Seconds that it took."""
    began_s = time.monotonic()
    while not await what():
        waited_s = time.monotonic() - began_s
        if waited_s > _PATIENCE_S:
            raise RuntimeError(f"{what.__qualname__} did not hold within {_PATIENCE_S:g} s")
        await asyncio.sleep(0.05)
    return round(time.monotonic() - began_s, 2)


async def all_of_it(engines: list[EngineServer], folder: Path, found: dict[str, Any]) -> None:
    """Each scenario is in `found` when it is over."""
    door = Door(engines, folder / "door.log")
    try:
        await door.ready()
        for each in engines:
            each.start()
        began_s = time.monotonic()

        async def in_service(engine: EngineServer) -> float:
            await _until(lambda: door.is_alive(engine.engine))
            return round(time.monotonic() - began_s, 2)

        loaded = await asyncio.gather(*(in_service(each) for each in engines))
        found["in_service_after_s"] = dict(zip([e.engine for e in engines], loaded, strict=True))
        found["calm"] = await calm(door, engines)
        for each in engines:
            found["killed"][each.engine] = await killed(door, each)
        for each in engines:
            found["stopped"][each.engine] = await stopped(door, each)
        found["key"] = await wrong_key(door, engines[0])
    finally:
        door.stop()


def table(found: dict[str, Any]) -> str:
    rows = [("calm", found["calm"])] if "calm" in found else []
    rows += [(f"{each} killed", row) for each, row in found["killed"].items()]
    rows += [(f"{each} stopped", row) for each, row in found["stopped"].items()]
    if "key" in found:
        rows.append(("llama.cpp wants a key", found["key"]))
    lines = [
        "| | requests | good | errors after a beginning | before anything | mixed "
        "| longest, streamed | longest, whole | found dead | in service again |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        longest = row["longest_s"]
        cells = [name, row["requests"], row["good"]]
        for errors in (row["errors_after_a_beginning"], row["errors_before_anything"]):
            cells.append(", ".join(f"{n}x {what}" for what, n in errors.items()) or "-")
        cells += [row["mixed"], f"{longest['streamed']} s", f"{longest['whole']} s"]
        for key in ("found_dead_s", "in_service_again_s"):
            cells.append(f"{row[key]} s" if key in row else "-")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = ", ".join(found["engines"].values())
    return f"{versions}; {found['machine']}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2, as a GGUF file")
    parser.add_argument("--environments", type=Path, required=True, help="made there if need be")
    parser.add_argument("--folder", type=Path, default=None, help="for models and logs; kept")
    parser.add_argument("--output", type=Path, default=None, help="FILE.json and FILE.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        with EngineServers(args.environments, folder, args.model) as engines:
            found: dict[str, Any] = {
                **conditions(sys.argv),
                "engines": {each.engine: each.version for each in engines},
                "killed": {},
                "stopped": {},
            }
            try:
                asyncio.run(all_of_it(engines, folder, found))
            except RuntimeError as error:
                found["broken_off"] = str(error)
    keep(found, table(found), args.output)


if __name__ == "__main__":
    main()
