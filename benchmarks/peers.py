"""shoal against llama.cpp, OpenVINO GenAI, transformers and vLLM, on this machine's CPU.

    python benchmarks/peers.py                       all that can be had here, 5 rounds
    python benchmarks/peers.py --only shoal,llama    these engines
    python benchmarks/peers.py --only shoal-int4,llama-q4_0 --quick

Every peer gets an environment of its own, with pinned versions, made at the first run
(llama.cpp compiles for 20 to 30 minutes). In each round every engine has a turn: a fresh
process, the same token ids. Medians, raw rounds and a page for people go to
`benchmarks/results/`, anew after each round. What fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from peer_environments import ENVIRONMENTS, EnvironmentFailedError, make_environment
from peer_report import markdown, spread, summarise, targets
from peer_tasks import QUICK, Sizes, TaskSet, tasks_of
from peer_turns import bandwidths_gb_s, build_probe, import_torch_s, run_turn
from peer_variants import (
    ModelFiles,
    Variant,
    chosen,
    has_bf16_instructions,
    kv_options,
    variants_for,
)

from shoal.core.errors import ShoalError
from shoal.model.spec import read_spec

HERE = Path(__file__).parent
ENGINES = ("shoal", *ENVIRONMENTS)


class Run:
    """One run of the benchmark: what is left to measure, and what came of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._files = ModelFiles(args.model, args.envs / "models", args.envs)
        spec = read_spec(self._files.source)
        self._vocab_size = spec.vocab_size
        self._sizes = (QUICK if args.quick else Sizes()).at_most(spec.max_positions)
        variants = variants_for(self._files.source, has_bf16_instructions())
        self._variants = chosen(variants, args.only)
        self._pythons: dict[str, Path] = {}
        self._failures: dict[str, str] = {}
        self._turns: list[dict[str, Any]] = []
        self._rounds: list[dict[str, Any]] = []
        self._probe: Path | None = None
        self._probe_error = ""

    def prepare(self) -> None:
        """Environments, files, and a first start of each, so that disk caches are warm."""
        try:
            self._probe = build_probe(self._args.envs)
        except (OSError, subprocess.CalledProcessError) as error:
            self._probe_error = str(error)
        for variant in self._variants:
            say(f"preparing {variant.name}")
            try:
                self._files.path(variant.weights)
                self._pythons[variant.name] = self._python(variant.engine)
            except (EnvironmentFailedError, RuntimeError, OSError) as error:
                self._failures[variant.name] = str(error)
                continue
            self._turn(variant, "common", "start", only_start=True)

    def run(self) -> None:
        for index in range(self._args.rounds):
            row: dict[str, Any] = {"load_average": os.getloadavg()[0]}
            if self._probe is not None:
                row["bandwidth_gb_s"] = bandwidths_gb_s(self._probe, self._args.threads)
            row["import_torch_s"] = import_torch_s()
            self._rounds.append(row)
            # Another order each time: what one leaves behind (heat, caches) hits them all.
            order = random.Random(index).sample(self._variants, len(self._variants))
            for variant in order:
                self._measure(variant, index)
            self.write()

    def _measure(self, variant: Variant, index: int) -> None:
        sets: tuple[TaskSet, ...] = ("common", "growth") if variant.growth else ("common",)
        for task_set in sets:
            if variant.name in self._failures:
                return
            say(f"round {index + 1} of {self._args.rounds}: {variant.name}, {task_set}")
            turn = self._turn(variant, task_set, f"{self._args.seed}/{index}/{task_set}")
            self._turns.append(
                {"round": index, "variant": variant.name, "task_set": task_set, **turn}
            )

    def _turn(
        self, variant: Variant, task_set: TaskSet, seed: str, *, only_start: bool = False
    ) -> dict[str, Any]:
        model = self._files.path(variant.weights)
        job = {
            "model": str(model),
            "options": variant.options,
            "num_threads": self._args.threads,
            **tasks_of(task_set, self._sizes, self._vocab_size, seed),
        }
        if only_start:
            job["tasks"] = []
        python, worker = self._pythons[variant.name], f"{variant.engine}_worker.py"
        try:
            if variant.engine == "shoal":
                options = variant.options | self._args.shoal_option
                job["options"] = kv_options(model, options, job)
            turn = run_turn(python, worker, job, self._args.turn_limit)
        except (ShoalError, TypeError) as error:  # TypeError: a --shoal-option there is not
            turn = {"error": str(error)}
        if "error" in turn:
            self._failures[variant.name] = turn["error"]
            say(f"{variant.name} failed: {turn['error']}")
        return turn

    def _python(self, engine: str) -> Path:
        if engine == "shoal":
            return Path(sys.executable)
        return make_environment(engine, self._args.envs)

    def write(self) -> None:
        report = self._report()
        name = f"peers_{'quick_' if self._args.quick else ''}{report['date']}"
        self._args.output.mkdir(parents=True, exist_ok=True)
        (self._args.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (self._args.output / f"{name}.md").write_text(markdown(report))

    def _report(self) -> dict[str, Any]:
        measured = summarise(self._turns, self._sizes.prefill)
        summary = {each.name: measured.get(each.name, {}) for each in self._variants}
        bandwidths = [
            spread(row["bandwidth_gb_s"])["median"] for row in self._rounds if self._probe
        ]
        weight_bytes = {
            each.name: self._files.weight_bytes(each)
            for each in self._variants
            if each.engine == "shoal" and each.name not in self._failures
        }
        bandwidth = spread(bandwidths) if bandwidths else None
        floors = {
            name: bandwidth["median"] * 1e9 / size if bandwidth else 0.0
            for name, size in weight_bytes.items()
        }
        import_torch = spread([row["import_torch_s"] for row in self._rounds])
        return {
            "command": shlex.join(["python", *map(_without_place, sys.argv)]),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "machine": _machine(),
            "model": _without_place(self._args.model),
            "num_threads": self._args.threads,
            "num_rounds": len(self._rounds),
            "sizes": dataclasses.asdict(self._sizes),
            "versions": {
                turn["variant"].split()[0]: turn["versions"]
                for turn in self._turns
                if "versions" in turn
            },
            "failures": {
                name: reason.replace(str(self._args.envs), "ENVS")
                for name, reason in self._failures.items()
            },
            "summary": summary,
            "import_torch_s": import_torch,
            "bandwidth_gb_s": bandwidth,
            "bandwidth_error": self._probe_error,
            "weight_bytes": weight_bytes,
            "floors": floors if bandwidth else {},
            "targets": targets(summary, floors if bandwidth else {}, import_torch["median"]),
            "rounds": self._rounds,
            "turns": self._turns,
        }


def say(line: str) -> None:
    sys.stderr.write(f"peers: {line}\n")


def _without_place(word: str) -> str:
    """Where files lie on this machine is nobody's business."""
    return Path(word).name if Path(word).is_absolute() else word


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(HERE), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" + changes" if git("status", "-s") else "")


def _machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.split() for name, value in fields.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": " ".join(named.get("model name", [platform.machine()])),
        "cores": psutil.cpu_count(logical=True),
        "instructions": " ".join(flag for flag in wanted if flag in named.get("flags", [])),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE, as in kernels=reference")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as `shoal serve` takes it; peers want GGUF")
    add("--only", default=",".join(ENGINES), help="engines, or variants such as llama-q4_0")
    add("--rounds", type=int, default=None, help="default: 5; with --quick 1")
    add("--quick", action="store_true", help="short tasks: does everything run?")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--seed", type=int, default=0, help="of the token ids")
    add("--envs", type=Path, default=cache / "shoal" / "peers", help="peers' environments")
    add("--output", type=Path, default=HERE / "results", help="a folder")
    add("--turn-limit", type=float, default=900.0, help="seconds a turn may take")
    add("--shoal-option", type=_option, action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    args.only = [name.strip() for name in args.only.split(",") if name.strip()]
    args.shoal_option = dict(args.shoal_option)
    args.rounds = args.rounds or (1 if args.quick else 5)
    return args


def main() -> None:
    args = _arguments()
    try:
        run = Run(args)
    except (ShoalError, ValueError) as error:
        sys.exit(str(error))
    if os.getloadavg()[0] > 0.5:
        say(f"something else is running here (load {os.getloadavg()[0]:.1f}): expect noise")
    run.prepare()
    run.run()
    run.write()


if __name__ == "__main__":
    main()
