"""Streams to a server, several at once, and what became of them; the plans that tests serve."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from server_process import ServerProcess

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
)
PLANS = {
    "two ranks": "stages: [{layers: 0-30, devices: [cpu, cpu]}]",
    "three uneven ranks": (
        "stages: [{layers: 0-30, devices: [cpu, cpu, cpu], split: [0.55, 0.35, 0.1]}]"
    ),
    "four ranks": "stages: [{layers: 0-30, devices: [cpu, cpu, cpu, cpu]}]",
    "three stages": (
        "stages: [{layers: 0-4, devices: [cpu]}, {layers: 4-21, devices: [cpu]},"
        " {layers: 21-30, devices: [cpu]}]"
    ),
    "2, 1, 2 ranks": (
        "stages: [{layers: 0-10, devices: [cpu, cpu]}, {layers: 10-20, devices: [cpu]},"
        " {layers: 20-30, devices: [cpu, cpu]}]"
    ),
    "two instances": (
        "stages: [{layers: 0-10, devices: [cpu]},"
        " {instances: [{layers: 10-20, devices: [cpu]}, {layers: 10-20, devices: [cpu]}]},"
        " {layers: 20-30, devices: [cpu]}]"
    ),
}


@dataclass
class Stream:
    """One completion: its tokens, when each chunk came, how it ended."""

    body: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)

    def run(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        request = {**self.body, "stream": True, "return_token_ids": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=request, headers=headers, timeout=240
        ) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.ends.append(event["error"])
                    return
                for choice in event["choices"]:
                    self.tokens += choice.get("token_ids") or []
                    self.times.append(time.monotonic())
                    if choice["finish_reason"]:
                        self.ends.append(choice["finish_reason"])


class Streams:
    """Several at once, greedy and sampled by turns."""

    def __init__(self, url: str, count: int, max_tokens: int) -> None:
        self.streams = [Stream(_body(index, max_tokens)) for index in range(count)]
        self._threads = [
            threading.Thread(target=stream.run, args=(url,)) for stream in self.streams
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_each_has(self, num_tokens: int) -> None:
        end = time.monotonic() + 120
        while min(len(stream.tokens) for stream in self.streams) < num_tokens:
            assert time.monotonic() < end, "no tokens within 120 s"
            time.sleep(0.01)

    def results(self) -> list[list[int]]:
        for thread in self._threads:
            thread.join(240)
            assert not thread.is_alive(), "a stream hangs"
        assert [stream.ends for stream in self.streams] == [["length"]] * len(self.streams)
        return [stream.tokens for stream in self.streams]

    def longest_gap_s(self, since_s: float) -> float:
        """Between tokens of any stream, from a moment on."""
        times = sorted(at for stream in self.streams for at in stream.times if at > since_s)
        edges = [since_s, *times]
        return max(b - a for a, b in zip(edges, times, strict=False))


def workers_of(server: ServerProcess) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "shoal.worker.process" in " ".join(child.cmdline())
    ]


def plan_file(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def _body(index: int, max_tokens: int) -> dict[str, Any]:
    sampled = {"temperature": 0.8, "seed": index, "top_p": 0.95 if index % 4 == 3 else 1.0}
    return {
        "model": "smollm2-135m",
        "prompt": f"{PROMPTS[index % len(PROMPTS)]} ({index})",
        "ignore_eos": True,
        "max_tokens": max_tokens,
        **(sampled if index % 2 else {"temperature": 0}),
    }
