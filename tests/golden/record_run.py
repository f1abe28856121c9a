"""Makes the recorded run that `test_recorded_run.py` takes again.

    python tests/golden/record_run.py MODEL FOLDER

Two replicas of a real model with little room for KV, as `shoal serve --record` has them: prompts
that begin alike, more requests than run at once, clients that leave, an engine that is killed while
it serves. To be made anew when router or engine are meant to decide otherwise.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from random import Random

import httpx

_NUM_REQUESTS, _NUM_LEAVING = 14, 2


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as made:
        flags = ["--port", "0", "--data-parallel-size", "2", "--num-threads", "1"]
        flags += ["--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
        flags += ["--kv-cache-memory-bytes", str(14 * 16 * 23_040 * 2), "--max-model-len", "200"]
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "serve", str(model), *flags, "--record", made],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _use(_url(process), process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
        for path in sorted(Path(made).iterdir()):
            (folder / path.name).write_bytes(path.read_bytes())


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        if match := re.match(r"^ready .* at (http://\S+)/v1", line):
            return match[1]
    sys.exit("the server did not become ready")


def _use(url: str, server: int) -> None:
    """All requests at once; an engine dies when a few of them have been served."""
    rng, first_done = Random(0), threading.Event()
    common = [rng.randrange(1000, 40_000) for _ in range(48)]
    threads = []
    for number in range(_NUM_REQUESTS):
        own = [rng.randrange(1000, 40_000) for _ in range(rng.choice([3, 30, 70]))]
        body = {
            "model": "smollm2",
            "prompt": [*common[: rng.choice([0, 48])], *own],
            "max_tokens": rng.choice([5, 20, 50]),
            "ignore_eos": number % 3 > 0,
            "temperature": number % 2,
            "stream": True,
        }
        arguments = (url, body, number < _NUM_LEAVING, first_done)
        threads.append(threading.Thread(target=_ask, args=arguments))
        threads[-1].start()
    first_done.wait()
    engines = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    os.kill(int(engines[0]), signal.SIGKILL)
    for thread in threads:
        thread.join()


def _ask(url: str, body: dict[str, object], leaves: bool, done: threading.Event) -> None:
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response,
    ):
        for number, line in enumerate(response.iter_lines()):
            if leaves and number > 4:
                return
            if line.startswith("data: [DONE]"):
                done.set()


if __name__ == "__main__":
    main()
