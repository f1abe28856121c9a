"""How long until the first token, after a start and after a repeated prompt.

    python benchmarks/first_light.py --rounds 5

Each round, interleaved: a bare `import torch` in a fresh process; `shoal serve` from process
start to the first token of a completion; on that server, the TTFT of a new 512-token prompt
and of the same prompt again. Medians and the ratio go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import torch

_READY = re.compile(r"^ready .* at (http://\S+)/v1")


def seconds_of(command: list[str]) -> float:
    started_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started_s


def ttft_s(url: str, prompt: list[int]) -> float:
    """Seconds until the first streamed token of a completion."""
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    body["model"] = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    started_s = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        first_s = time.perf_counter() - started_s
        # To the end, so that nothing of this request is left when the next one comes.
        assert "[DONE]" in list(lines)[-1]
        return first_s


def measure_server(model: str, rng: random.Random) -> dict[str, float]:
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "serve", model, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        url = next(match[1] for line in process.stderr if (match := _READY.match(line)))
        ttft_s(url, [1, 2, 3])
        start_s = time.perf_counter() - started_s
        prompt = [rng.randrange(1000, 40_000) for _ in range(512)]
        new_s, again_s = ttft_s(url, prompt), ttft_s(url, prompt)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    return {"start_to_first_token_s": start_s, "ttft_new_s": new_s, "ttft_again_s": again_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    rng = random.Random(0)
    measure_server(args.model, rng)  # the first start fetches the model and fills disk caches
    rounds = [
        {
            "import_torch_s": seconds_of([sys.executable, "-c", "import torch"]),
            **measure_server(args.model, rng),
        }
        for _ in range(args.rounds)
    ]
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "medians": medians,
        "start_minus_import_torch_s": medians["start_to_first_token_s"] - medians["import_torch_s"],
        "ttft_again_over_new": statistics.median(
            row["ttft_again_s"] / row["ttft_new_s"] for row in rounds
        ),
        "rounds": rounds,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
