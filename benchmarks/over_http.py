"""What serving over HTTP costs: server CPU per streamed token, and the rate against `LLM`.

    python benchmarks/over_http.py --rounds 5                  # a real model
    python benchmarks/over_http.py --rounds 5 --step-ms 20     # an engine that only pretends
    python benchmarks/over_http.py --rounds 5 --before SRC     # beside another version of shoal

Each round, interleaved, over the same greedy requests (token ids in, --max-tokens each): all
streams at once over HTTP from a client that only counts; then `LLM.generate` in this process
(real models only). CPU is what the threads of the server's process ran, engine processes not
included, over all tokens of a round, so parsing the requests is in it. Medians go to
`benchmarks/results/`, as JSON and as a table. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

_READY = re.compile(r"^ready .* at (http://\S+)/v1")
_PRETEND = Path(__file__).with_name("pretend_engine.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=None, help="no model: a pretended step")
    parser.add_argument("--quantize", default="auto", help="weights of a real model")
    parser.add_argument("--before", type=Path, help="a src folder with the shoal to compare with")
    parser.add_argument("--serve-pretend", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    if args.serve_pretend:
        sys.exit(serve_pretend(args.model, args.step_ms))
    rounds = list(measure(args))
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "medians": medians,
        "rounds": rounds,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
        args.output.with_suffix(".md").write_text(as_table(report))
    sys.stdout.write(text + "\n")


def measure(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """One row a round; a round before them warms everything up."""
    command = [sys.executable, "-m", "shoal", "serve", args.model, "--port", "0"]
    command += ["--quantize", args.quantize]
    if args.step_ms is not None:
        command = [sys.executable, *sys.argv, "--serve-pretend"]
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:
        process, url = stack.enter_context(running(command))
        earlier = None
        if args.before is not None:
            earlier = stack.enter_context(running(command, args.before))
        llm = None
        if args.step_ms is None:
            from shoal import LLM

            llm = stack.enter_context(LLM(args.model, quantize=args.quantize))
        for number in range(-1, args.rounds):
            # New ones each round, the same for both: no prefix is found cached.
            prompts = [
                [rng.randrange(1000, 40_000) for _ in range(args.prompt_tokens)]
                for _ in range(args.streams)
            ]
            row = over_http(process, url, prompts, args.max_tokens)
            if earlier is not None:
                before = over_http(*earlier, prompts, args.max_tokens)
                row |= {f"before_{key}": value for key, value in before.items()}
            if llm is not None:
                row["llm_tokens_per_s"] = in_process(llm, prompts, args.max_tokens)
                row["http_over_llm"] = row["http_tokens_per_s"] / row["llm_tokens_per_s"]
            if number >= 0:
                yield row


def over_http(
    process: psutil.Process, url: str, prompts: list[list[int]], max_tokens: int
) -> dict[str, float]:
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    bodies = [
        json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        for prompt in prompts
    ]
    before_s, started_s = cpu_s(process), time.perf_counter()
    num_events = asyncio.run(stream_all(url, bodies))
    used_s, taken_s = cpu_s(process) - before_s, time.perf_counter() - started_s
    num_tokens = max_tokens * len(prompts)
    return {
        "http_tokens_per_s": num_tokens / taken_s,
        "server_cpu_us_per_token": 1e6 * used_s / num_tokens,
        "events_per_token": num_events / num_tokens,
        "loop_ns": loop_ns(),
    }


def cpu_s(process: psutil.Process) -> float:
    """What its threads have run, to the nanosecond: a process's times come in steps of 10 ms."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def in_process(llm: Any, prompts: list[list[int]], max_tokens: int) -> float:
    """Tokens per second of the same work without HTTP."""
    from shoal import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    started_s = time.perf_counter()
    completions = llm.generate(prompts, params)
    taken_s = time.perf_counter() - started_s
    return sum(len(completion.token_ids) for completion in completions) / taken_s


class _Stream(asyncio.Protocol):
    """One request and the bytes that came for it, looked at when all are there."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._received = bytearray()
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data

    def connection_lost(self, error: Exception | None) -> None:
        assert b"data: [DONE]" in self._received, bytes(self._received[-500:])
        self.done.set_result(self._received.count(b"\ndata: ") - 1)


async def stream_all(url: str, bodies: list[bytes]) -> int:
    """Events (less the [DONE]s) of all requests, sent at once."""
    address = urlsplit(url)
    streams = []
    for body in bodies:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        stream = _Stream(head.encode() + body)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda stream=stream: stream, address.hostname, address.port)
        streams.append(stream)
    return sum([await stream.done for stream in streams])


@contextlib.contextmanager
def running(command: list[str], source: Path | None = None) -> Iterator[tuple[psutil.Process, str]]:
    """A server's process and URL; `source`: where its shoal is."""
    env = dict(os.environ) if source is None else {**os.environ, "PYTHONPATH": str(source)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        url = next(match[1] for line in process.stderr if (match := _READY.match(line)))
        yield psutil.Process(process.pid), url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def serve_pretend(model: str, step_ms: float) -> int:
    """`shoal serve` with a pretended engine behind it."""
    from shoal.cli.serving import ServeSettings, bind, run
    from shoal.core.options import EngineOptions
    from shoal.model.store import resolve
    from shoal.router.engine_client import EngineClient

    found = resolve(model)
    settings = ServeSettings(
        engine=EngineOptions(model_path=str(found.path)), served_model_names=(found.name,)
    )
    command = [sys.executable, str(_PRETEND), str(step_ms)]
    client = EngineClient("pretended", command, settings.engine, lambda loading: None)
    return run(settings, bind("127.0.0.1", 0, ()), [client])


def loop_ns() -> float:
    """CPU time of one turn of a plain Python loop: how fast this machine is at the moment.

    Virtual machines swing by a factor of three; CPU times compare only where this is alike.
    """
    turns, started_s = 3_000_000, time.process_time()
    for _ in range(turns):
        pass
    return 1e9 * (time.process_time() - started_s) / turns


def as_table(report: dict[str, Any]) -> str:
    """Medians for people; what was measured `before` in a column of its own."""
    medians = report["medians"]
    keys = [key for key in medians if not key.startswith("before_")]
    rows = [
        f"| {key} | {medians[key]:.3g} | {_number(medians.get(f'before_{key}'))} |" for key in keys
    ]
    return "\n".join(
        [
            "# Over HTTP",
            "",
            f"`{report['command']}` at {report['commit']} on {report['machine']}; medians of "
            f"{len(report['rounds'])} rounds.",
            "",
            "| | now | before |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


if __name__ == "__main__":
    main()
