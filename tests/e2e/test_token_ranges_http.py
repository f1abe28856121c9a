"""A context that no rank has the memory for, served over HTTP: KV split by token ranges.

Rounding to int8 falls differently on other splits and moves scores a little; the text is such
that no choice hangs on that.
"""

from __future__ import annotations

import httpx
from server_process import ServerProcess, StartServer

CONTEXT = 7500
LINES = 234
_TOKEN_BYTES_PER_HEAD = 2 * 30 * 64  # of SmolLM2 in int8, without scales
# What one KV head of three takes in bfloat16; in int8 a rank needs 1.6 times the half of all three.
KV_BYTES = 2 * _TOKEN_BYTES_PER_HEAD * (CONTEXT + 4)
FLAGS = ("--kv-cache-dtype", "int8", "--max-model-len", str(CONTEXT))
TWO_RANKS = ("--tensor-parallel-size", "2", "--kv-cache-memory-bytes", str(KV_BYTES))


def test_a_long_context_over_two_ranks(start_server: StartServer) -> None:
    prompt = long_text()
    found = []
    for more in ((), (*TWO_RANKS, "--kv-split", "tokens")):
        server = start_server(*FLAGS, *more)
        found.append(complete(server, prompt))
        server.stop()
    assert found[0] == found[1]


def test_by_heads_it_does_not_fit(start_server: StartServer) -> None:
    server = start_server(*FLAGS, *TWO_RANKS, wait=False)
    assert server.process.wait(60) != 0
    assert "instance 0 of stage 0 holds 7056 tokens" in "\n".join(server.lines)


def long_text() -> str:
    """A list that begins again: how it goes on is plain, from thousands of tokens before."""
    things = ("lantern", "harbor", "violin", "garden", "letter", "engine", "window", "mountain")
    deeds = ("opened", "painted", "carried", "followed", "measured", "repaired", "remembered")
    lines = [
        f"{n}. The {things[n % 8]} near the {things[n * 5 % 7]} was {deeds[n * 3 % 7]} by the "
        f"{things[n * n % 8]}."
        for n in range(100, 100 + LINES)
    ]
    return "\n".join([*lines, *lines[: LINES - 3], lines[LINES - 3].split(" near")[0]])


def complete(server: ServerProcess, prompt: str) -> list[int]:
    body = {
        "model": "smollm2-135m",
        "prompt": prompt,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()
    assert CONTEXT - 100 < answer["usage"]["prompt_tokens"] <= CONTEXT - 16
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    assert len(token_ids) == 16
    return token_ids
