"""A lab, driven by the commands that people type: probed, brought up, loaded, simulated, ended.

Knows nothing of what is compared with what.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

NAME = "benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """
    Attributes:
        folder: for files that come and go.
        model: of the server, and of the cost model.
        precision: of weights.
    """

    folder: Path
    model: str
    precision: str = "int8"
    api_key: str = field(default_factory=lambda: secrets.token_hex(16))

    def probed(self, lab: str, kept: Path | None) -> tuple[Path, Path]:
        """A lab file, and what the probe says of it; `kept`: what it said before."""
        lab_file, cluster = self.folder / "lab.yaml", self.folder / "cluster.yaml"
        lab_file.write_text(lab)
        if kept is None:
            self.probe(lab_file, cluster)
        else:
            cluster.write_text(kept.read_text())
        return lab_file, cluster

    def probe(self, lab: Path, cluster: Path) -> None:
        """Through the lab's throttles: what planner and simulator know of it."""
        self._shoal(
            "probe", "--lab", str(lab), "-o", str(cluster), "--model", self.model,
            "--precision", self.precision,
        )  # fmt: skip

    def refit(self, url: str, cluster: Path, fitted: Path) -> None:
        """From the Steps that a server has run."""
        self._shoal(
            "probe", "--from", url, "--cluster", str(cluster), "--model", self.model,
            "-o", str(fitted),
        )  # fmt: skip

    @contextmanager
    def up(self, lab: Path, plan: Path, *flags: str) -> Iterator[str]:
        """The server's address; `flags` are the server's."""
        said = self._shoal(
            "lab", "up", str(lab), "--plan", str(plan), "--port", "0", "--name", NAME,
            "--quantize", self.precision, *flags,
        )  # fmt: skip
        try:
            yield next(word for word in said.split() if word.startswith("http"))
        finally:
            self._shoal("lab", "down", "--name", NAME)

    def lab(self, *arguments: str) -> str:
        """A command to the lab that is up: slow, stop, resume, kill, cut, heal, status."""
        return self._shoal("lab", *arguments, "--name", NAME)

    def bench(self, url: str, trace: Path, vocab_size: int, *flags: str) -> dict[str, Any]:
        """Of a live run."""
        base = url.removesuffix("/v1")
        return self._json(
            "bench", base, "--workload", str(trace), "--vocab-size", str(vocab_size), "--json",
            *flags,
        )  # fmt: skip

    def simulate(self, plan: Path, cluster: Path, trace: Path, *flags: str) -> dict[str, Any]:
        return self._json(
            "simulate", str(plan), "--cluster", str(cluster), "--workload", str(trace),
            "--model", self.model, "--precision", self.precision, "--json", *flags,
        )  # fmt: skip

    def plan(self, cluster: Path, plan: Path, *flags: str) -> str:
        """What `shoal plan` says."""
        return self._shoal(
            "plan", self.model, "--cluster", str(cluster), "--precision", self.precision,
            "-o", str(plan), *flags,
        )  # fmt: skip

    def _json(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._shoal(*arguments))
        return found

    def _shoal(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "shoal", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "SHOAL_API_KEY": self.api_key},
        )
        if done.returncode:
            sys.exit(f"shoal {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests: (arrival, prompt's tokens, answer's tokens)."""

    requests: tuple[tuple[float, int, int], ...]

    def at_rate(self, rate: float) -> Trace:
        """The same gaps between arrivals, stretched to a mean rate."""
        start_s, end_s = self.requests[0][0], self.requests[-1][0]
        factor = (len(self.requests) - 1) / rate / max(end_s - start_s, 1e-9)
        return Trace(tuple(((at - start_s) * factor, *rest) for at, *rest in self.requests))

    def write(self, path: Path) -> Path:
        lines = (
            json.dumps({"arrival_s": at, "prompt_tokens": prompt, "output_tokens": answer})
            for at, prompt, answer in self.requests
        )
        path.write_text("\n".join(lines) + "\n")
        return path


def azure(path: Path, first: int, count: int, shrink: int, longest: tuple[int, int]) -> Trace:
    """So many requests of an Azure CSV from the first on, their lengths cut down to a small model.

    Args:
        shrink: lengths are divided by it.
        longest: prompt and answer; longer ones are cut off.
    """
    requests = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if first <= number < first + count:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                prompt = min(max(int(row["ContextTokens"]) // shrink, 8), longest[0])
                answer = min(max(int(row["GeneratedTokens"]) // shrink, 4), longest[1])
                requests.append((at, prompt, answer))
    return Trace(tuple(requests))


def arguments(what: str) -> argparse.ArgumentParser:
    """Those that every benchmark of a lab has."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--trace", type=Path, required=True, help="Azure's CSV")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--cluster", type=Path, default=None, help="probed before, of this lab")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--output", type=Path, default=None, help="FILE.json and FILE.md")
    return parser


def keep(report: Mapping[str, Any], table: str, output: Path | None) -> None:
    """Shown, and written where somebody said."""
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(table)
    sys.stdout.write(table)


def conditions(command: Sequence[str]) -> dict[str, str]:
    """Under which a result came about; of files in the command, their names."""
    where = str(Path(__file__).parent)
    done = subprocess.run(
        ["git", "-C", where, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = (",".join(Path(each).name for each in word.split(",")) for word in command[1:])
    return {
        # Where this machine keeps its files is nobody's business.
        "command": " ".join(["python", f"benchmarks/{Path(command[0]).name}", *names]),
        "commit": done.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
