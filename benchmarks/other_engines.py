"""`shoal route` before servers of other engines, unmodified: what their users see when one fails.

    python benchmarks/other_engines.py --model smollm2.gguf --environments DIR --output FILE

Three engines (`benchmarks/engine_servers.py`) serve the same weights on this CPU. Each scenario is
requests of the `openai` client, streamed and whole in turn, some at a time:

    alone      each engine in turn is all that takes requests, and must answer each kind of them
    calm       nothing happens: who answers what, under which name
    killed     an engine is killed (-9) in the middle of them, and started again
    stopped    an engine is stopped (SIGSTOP) for a while
    key        an engine wants a key that the door has not got

An answer is mixed if two answers' ids are in it; it is good if it holds text and says how it
finished. An engine is in service again once it has answered requests, streamed and whole.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_door import Door, is_not, load, told, until
from engine_servers import EngineServer, EngineServers
from lab_session import conditions, keep

_ALL_KINDS = 6
"""Of requests, as `ask` numbers them."""


async def alone(door: Door, engine: EngineServer) -> dict[str, Any]:
    """
    Raises:
        RuntimeError: it did not answer all of them itself.
    """
    before = await door.num_tokens(engine.engine)
    async with door.only(engine.engine):
        answers = await load(door, _ALL_KINDS, at_once=2, max_tokens=16)
    num_tokens = await door.num_tokens(engine.engine) - before
    found = {**told(answers), "output_tokens": num_tokens}
    if not all(each.is_good for each in answers) or num_tokens < len(answers):
        raise RuntimeError(f"{engine.engine} did not answer what was asked of it alone: {found}")
    return found


async def answers_again(door: Door, engine: EngineServer) -> float:
    """Seconds until it did, streamed and whole."""
    before = await door.num_tokens(engine.engine)

    async def has_answered() -> bool:
        answers = await load(door, 2, max_tokens=4)
        has_said = await door.num_tokens(engine.engine) > before
        return has_said and all(each.is_good for each in answers)

    waited_s = await until(lambda: door.is_alive(engine.engine))
    async with door.only(engine.engine):
        return round(waited_s + await until(has_answered), 2)


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
        times["found_dead_s"] = await until(lambda: is_not(door.is_alive(engine.engine)))

    found = told(await load(door, 18, at_once=9, meanwhile=kill))
    engine.start()
    times["in_service_again_s"] = await answers_again(door, engine)
    return {**found, **times}


async def stopped(door: Door, engine: EngineServer) -> dict[str, Any]:
    times: dict[str, float] = {}

    async def stop() -> None:
        times["requests_there"] = await _requests_at(door, engine.engine)
        engine.send(signal.SIGSTOP)

    found = told(await load(door, 18, at_once=9, meanwhile=stop))
    times["found_dead_s"] = await until(lambda: is_not(door.is_alive(engine.engine)))
    engine.send(signal.SIGCONT)
    times["in_service_again_s"] = await answers_again(door, engine)
    return {**found, **times}


async def wrong_key(door: Door, engine: EngineServer) -> dict[str, Any]:
    """Of llama.cpp's server, which wants one from now on."""
    engine.stop()
    await until(lambda: is_not(door.is_alive(engine.engine)))
    engine.keys = ["sk-engine"]
    engine.start()

    async def says_why() -> bool:
        return "401" in door.log.read_text()

    waited_s = await until(says_why)
    before = await door.num_tokens(engine.engine)
    found = told(await load(door, 12))
    lines = [line for line in door.log.read_text().splitlines() if "401" in line]
    is_used = await door.num_tokens(engine.engine) > before
    engine.stop()
    engine.keys = []
    engine.start()
    again_s = await answers_again(door, engine)
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


async def all_of_it(engines: list[EngineServer], folder: Path, found: dict[str, Any]) -> None:
    """Each scenario is in `found` when it is over."""
    door = Door(engines, folder / "door.log")
    try:
        await door.ready()
        for each in engines:
            each.start()
        began_s = time.monotonic()

        async def in_service(engine: EngineServer) -> float:
            await until(lambda: door.is_alive(engine.engine))
            return round(time.monotonic() - began_s, 2)

        loaded = await asyncio.gather(*(in_service(each) for each in engines))
        found["in_service_after_s"] = dict(zip([e.engine for e in engines], loaded, strict=True))
        for each in engines:
            found["alone"][each.engine] = await alone(door, each)
        found["calm"] = await calm(door, engines)
        for each in engines:
            found["killed"][each.engine] = await killed(door, each)
        for each in engines:
            found["stopped"][each.engine] = await stopped(door, each)
        found["key"] = await wrong_key(door, engines[0])
    finally:
        door.stop()


def table(found: dict[str, Any]) -> str:
    rows = [(f"{each} alone", row) for each, row in found["alone"].items()]
    rows += [("calm", found["calm"])] if "calm" in found else []
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
                "alone": {},
                "killed": {},
                "stopped": {},
            }
            try:
                asyncio.run(all_of_it(engines, folder, found))
            except RuntimeError as error:
                found["broken_off"] = str(error)
    keep(found, table(found), args.output)
    if "broken_off" in found:
        raise SystemExit(found["broken_off"])


if __name__ == "__main__":
    main()
