"""What Ray Serve on the data path would cost, against our own HTTP path: per request, per token.

    python benchmarks/ray_serve.py --serve-python VENV/bin/python --output FILE

Both sides stream server-sent events that no model made: a Serve deployment with one replica, in an
environment of its own that has `ray[serve]`, and our server over a pretended engine
(`over_http.py`), one token every 5 ms each. Rounds are interleaved: streams of one token, then
streams of many, one after the other. Cost is CPU time of every process on the path but the client,
so that a busy machine does not matter: a token costs what the long streams need beyond the short
ones. The seconds on the clock are given too; ours hold up to 5 ms a request for the pretended
engine to wake.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

_STEP_MS = 5
"""Both sides' pace: tokens that come all at once would be sent as one."""

_APP = """
import asyncio, json, sys, time, ray
from ray import serve
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
app = FastAPI()
step_s = STEP_S

@serve.deployment(num_replicas=1, max_ongoing_requests=64)
@serve.ingress(app)
class Tokens:
    @app.post("/v1/completions")
    async def complete(self, body: dict):
        async def stream():
            for i in range(body["max_tokens"]):
                data = {"object": "text_completion", "choices": [{"index": 0, "text": " a"}]}
                await asyncio.sleep(step_s)
                yield f"data: {json.dumps(data)}\\n\\n"
            yield "data: [DONE]\\n\\n"
        return StreamingResponse(stream(), media_type="text/event-stream")

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(Tokens.bind())
print("ready", flush=True)
time.sleep(3600)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--serve-python", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer our server has")
    parser.add_argument("--requests", type=int, default=20, help="of a kind and round")
    parser.add_argument("--tokens", type=int, default=500, help="of a long stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    with _serving_by_ray(args.serve_python) as theirs, _serving_by_shoal(args.model) as ours:
        sides = {"ray_serve": theirs, "shoal": ours}
        for url, _ in sides.values():
            _run(url, args.requests, 10)
        rounds = [
            {name: _round(*side, args.requests, args.tokens) for name, side in sides.items()}
            for _ in range(args.rounds)
        ]
    medians = {
        name: {
            key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]
        }
        for name in sides
    }
    report = {
        "command": f"python benchmarks/ray_serve.py --requests {args.requests} "
        f"--tokens {args.tokens} --rounds {args.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "medians": medians,
        "rounds": rounds,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


Side = tuple[str, Callable[[], float]]
"""Where it serves, and the CPU seconds that it has used so far."""


def _round(url: str, used_s: Callable[[], float], requests: int, tokens: int) -> dict[str, float]:
    short = _measured(url, used_s, requests, 1)
    long = _measured(url, used_s, requests, tokens + 1)
    return {
        "request_cpu_ms": short[0] * 1e3,
        "request_ms": short[1] * 1e3,
        "token_cpu_us": (long[0] - short[0]) / tokens * 1e6,
        "token_us": (long[1] - short[1]) / tokens * 1e6,
    }


def _measured(
    url: str, used_s: Callable[[], float], requests: int, tokens: int
) -> tuple[float, float]:
    """CPU seconds and seconds of one request."""
    before_s, began_s = used_s(), time.perf_counter()
    _run(url, requests, tokens)
    return (used_s() - before_s) / requests, (time.perf_counter() - began_s) / requests


def _model(url: str) -> str:
    found = httpx.get(f"{url}/v1/models")
    return str(found.json()["data"][0]["id"]) if found.is_success else "any"


def _run(url: str, requests: int, tokens: int) -> None:
    model = _model(url)
    body = {"model": model, "prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=120) as client:
        for _ in range(requests):
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                for _chunk in answer.iter_raw():
                    pass


@contextlib.contextmanager
def _serving_by_ray(python: Path) -> Iterator[Side]:
    with tempfile.TemporaryDirectory(prefix="rs") as folder, socket.socket() as probe:
        app = Path(folder) / "app.py"
        app.write_text(_APP.replace("STEP_S", str(_STEP_MS / 1000)))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        with _started([str(python), str(app), folder, str(port)]) as (process, said):
            _wait_for(process, said, "ready")
            yield f"http://127.0.0.1:{port}", _used(process, ("Proxy", "Replica", "Tokens"))


@contextlib.contextmanager
def _serving_by_shoal(model: str) -> Iterator[Side]:
    script = str(Path(__file__).with_name("over_http.py"))
    command = [
        sys.executable,
        script,
        "--model",
        model,
        "--step-ms",
        str(_STEP_MS),
        "--serve-pretend",
    ]
    with _started(command) as (process, said):
        ready = _wait_for(process, said, "ready ")
        url = next(word for word in ready.split() if word.startswith("http"))
        yield url.removesuffix("/v1"), _used(process, ("",))


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[tuple[psutil.Process, Path]]:
    """A server with all it starts, ended with it; and the file that has what it says."""
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)
        family = psutil.Process(process.pid)
        try:
            yield family, Path(said.name)
        finally:
            started = [family, *family.children(recursive=True)]
            process.terminate()
            _, alive = psutil.wait_procs(started, timeout=15)
            for each in alive:
                each.kill()


def _wait_for(process: psutil.Process, said: Path, beginning: str) -> str:
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s and process.is_running():
        for line in said.read_text(errors="replace").splitlines():
            if line.startswith(beginning):
                return line
        time.sleep(0.1)
    sys.exit(f"a server did not start; it said:\n{said.read_text(errors='replace')}")


def _used(process: psutil.Process, names: tuple[str, ...]) -> Callable[[], float]:
    """Tells the CPU seconds of those processes below one that have such a name."""

    def used_s() -> float:
        total = 0.0
        for each in [process, *process.children(recursive=True)]:
            words = " ".join(each.cmdline())
            if any(name in words for name in names):
                times = each.cpu_times()
                total += times.user + times.system
        return total

    return used_s


if __name__ == "__main__":
    main()
