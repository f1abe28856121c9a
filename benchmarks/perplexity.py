"""The same GGUF files through llama.cpp and through shoal: do both find the same perplexity?

    python benchmarks/perplexity.py Q4_0.gguf Q8_0.gguf --llama-python VENV/bin/python

The text becomes token ids once, with shoal's tokenizer; both score the same positions of the same
windows (`shoal/worker/evaluate.py` says which). llama.cpp runs through llama-cpp-python, in the
environment named, with the logits of every position; shoal as `shoal eval` runs it, once for
each --shoal. What comes out goes to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "benchmarks" / "texts" / "alice.txt"
SHOAL = ["", "--dtype float32 --kernels reference"]


def llama_cpp_side() -> None:
    """In llama.cpp's environment: a job on stdin, log-probabilities on stdout."""
    import llama_cpp  # type: ignore[import-not-found]
    import numpy as np

    job = json.load(sys.stdin)
    context = job["context"]
    llama = llama_cpp.Llama(
        job["model"],
        n_ctx=context,
        n_batch=context,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        logits_all=True,
        verbose=False,
    )
    logprobs: list[float] = []
    for window, targets in zip(job["windows"], job["targets"], strict=True):
        llama.reset()
        llama.eval(window)
        first = context - 1 - len(targets)
        logits = llama.scores[first : context - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        totals = np.log(np.exp(logits).sum(-1))
        logprobs += (logits[np.arange(len(targets)), targets] - totals).tolist()
    own_ids = llama.tokenize(job["text"].encode(), add_bos=True, special=False)
    json.dump(
        {
            "logprobs": logprobs,
            "version": llama_cpp.__version__,
            "token_ids_agree": own_ids[: len(job["token_ids"])] == job["token_ids"],
        },
        sys.stdout,
    )


def measure_llama_cpp(python: str, model: Path, text: str, args: Any) -> dict[str, Any]:
    from shoal.text.tokenizer import load_tokenizer
    from shoal.worker.evaluate import Windows

    tokenizer = load_tokenizer(model)
    token_ids = tokenizer.encode(text)[: args.max_tokens]
    adds_bos = token_ids[:1] == [tokenizer.bos_token_id]
    windows = Windows(num_tokens=len(token_ids), context=args.context)
    cut = [token_ids[start : start + args.context] for start in windows.starts]
    job = {
        "model": str(model),
        "context": args.context,
        "threads": args.threads,
        "text": text,
        "token_ids": token_ids,
        "targets": [window[windows.first_scored + 1 :] for window in cut],
        "windows": [token_ids[:1] + window[1:] if adds_bos else window for window in cut],
    }
    done = subprocess.run(
        [python, __file__, "--llama-cpp-side"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    logprobs = found.pop("logprobs")
    return {
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "num_scored": len(logprobs),
        **found,
    }


def measure_shoal(model: Path, flags: str, args: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal", "eval", str(model), "--text", str(args.text)]
    command += ["--context", str(args.context), "--num-threads", str(args.threads), "--json"]
    if args.max_tokens is not None:
        command += ["--max-tokens", str(args.max_tokens)]
    done = subprocess.run(
        [*command, *shlex.split(flags)], stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity: shoal against llama.cpp.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--llama-python", required=True, help="a python that has llama_cpp")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shoal", action="append", help="flags of a shoal run; repeatable")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    rows = []
    for model in args.models:
        llama = measure_llama_cpp(args.llama_python, model, text, args)
        row: dict[str, Any] = {"model": model.name, "llama_cpp": llama, "shoal": []}
        _say(f"{model.name:<28} llama.cpp {llama['perplexity']:.4f}")
        for flags in args.shoal or SHOAL:
            report = measure_shoal(model, flags, args)
            assert report["num_scored"] == llama["num_scored"]
            settings = report["model"] | {"model": model.name}
            ratio = settings["perplexity"] / llama["perplexity"]
            row["shoal"].append({"flags": flags, "ratio": ratio, **settings})
            shown = f"{settings['perplexity']:.4f}  {ratio - 1:+.3%}"
            _say(f"{'':<28} shoal     {shown}  {settings['precision']}  {flags}")
        rows.append(row)
    date = datetime.datetime.now(tz=datetime.UTC).date()
    output = (
        args.output or ROOT / f"benchmarks/results/perplexity_{args.models[0].stem}_{date}.json"
    )
    result = {
        "command": shlex.join(["python", "benchmarks/perplexity.py", *map(_public, sys.argv[1:])]),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {args.threads} threads",
        "text": args.text.name,
        "context": args.context,
        "max_tokens": args.max_tokens,
        "models": rows,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _public(argument: str) -> str:
    """An argument without the machine's own folders."""
    return Path(argument).name if argument.startswith("/") else argument


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:] == ["--llama-cpp-side"]:
        llama_cpp_side()
    else:
        main()
