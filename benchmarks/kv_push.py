"""From prompt to decoding on another replica: with KV sent while it is computed, or afterwards.

    python benchmarks/kv_push.py --output FILE

Two engine processes, one of role prefill and one of role decode, behind a router. Of each request:

    ttft         until its first token, which the one that computes its prompt gives
    handover     from its first token until the other one has it
    late_tokens  meanwhile still given by the first, which has prompts to compute
    longest_gap  between two of its tokens
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.core.clock import MonotonicClock
from shoal.core.options import EngineOptions
from shoal.core.plan import Role
from shoal.core.request import GenerateRequest, SamplingParams
from shoal.model.store import resolve
from shoal.router.driver import Router
from shoal.router.engine_client import EngineClient
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState
from shoal.wire.kv_messages import make_kv_keys

ROLES: dict[str, Role] = {"replica-0": "prefill", "replica-1": "decode"}
WAYS = {"after the prompt": 0.0, "while it is computed": 60.0}
MAX_TOKENS, TOKENS_AFTER = 1000, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    ways = {name: asyncio.run(_measure(args, push_s)) for name, push_s in WAYS.items()}
    report = {
        "command": f"python benchmarks/kv_push.py --model {Path(args.model).stem} "
        f"--dtype {args.dtype} --prompt-tokens {args.prompt_tokens} --rounds {args.rounds}",
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "kv_bytes": ways["after the prompt"][0]["kv_bytes"],
        "median": {name: _median(rounds) for name, rounds in ways.items()},
        "rounds": ways,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


async def _measure(args: argparse.Namespace, push_timeout_s: float) -> list[dict[str, float]]:
    options = EngineOptions(
        model_path=str(resolve(args.model).path),
        dtype=args.dtype,
        num_threads=max((os.cpu_count() or 2) // 2, 1),
        device_share=0.5,
    )
    keys = make_kv_keys(dict.fromkeys(ROLES))
    command = [sys.executable, "-m", "shoal.cli.engine_process"]
    clients = [
        EngineClient(name, command, options, lambda loading: None, kv_keys=keys[name])
        for name in ROLES
    ]
    config = RouterConfig(
        replicas=tuple(ROLES), roles=ROLES, moves_kv=True, push_timeout_s=push_timeout_s
    )
    state = RouterState(config, random.Random(1))
    async with Router(state, list(clients), MonotonicClock()) as router:
        while len(state.alive) < len(ROLES):
            await asyncio.sleep(0.05)
        rounds = [await _complete(router, args.prompt_tokens, n) for n in range(args.rounds + 1)]
        assert router.info is not None
        for each in rounds:
            each["kv_bytes"] = args.prompt_tokens // 16 * router.info.kv_block_bytes
    return rounds[1:]  # the first one warms both up


async def _complete(router: Router, num_tokens: int, number: int) -> dict[str, float]:
    rng = random.Random(number)
    request = GenerateRequest(
        request_id=f"q{number}",
        prompt_ids=tuple(rng.randrange(100, 40_000) for _ in range(num_tokens)),
        sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True),
    )
    started_s, times_s = time.perf_counter(), list[float]()
    moving = asyncio.create_task(_when_moved(router))
    async with aclosing(router.generate(request)) as outputs:  # the next one finds nobody there
        async for output in outputs:
            if output.error is not None:
                sys.exit(f"a request failed: {output.error.message}")
            times_s += [time.perf_counter()] * len(output.token_ids)
            if moving.done() and sum(each > moving.result() for each in times_s) > TOKENS_AFTER:
                break
    moved_s = await moving
    gaps_s = [later - earlier for earlier, later in pairwise(times_s)]
    return {
        "ttft_s": round(times_s[0] - started_s, 3),
        "handover_s": round(max(moved_s - times_s[0], 0.0), 4),
        "late_tokens": sum(each <= moved_s for each in times_s[1:]),
        "longest_gap_s": round(max(gaps_s), 4),
    }


async def _when_moved(router: Router) -> float:
    """When the replica that goes on with requests has one."""
    while not router.replicas()["replica-1"].num_requests:
        await asyncio.sleep(0.001)
    return time.perf_counter()


def _median(rounds: list[dict[str, float]]) -> dict[str, Any]:
    names = ("ttft_s", "handover_s", "late_tokens", "longest_gap_s")
    return {name: statistics.median(each[name] for each in rounds) for name in names}


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
