"""The GPU path in one run: builds, checks against the reference, times, prints a short table.

    python benchmarks/gpu.py                 everything, on the first GPU
    python benchmarks/gpu.py --smoke         the script itself, on a CPU, in seconds

Measured: memory bandwidth (copy, read, from the host), each weight format's product, decode
attention, decode at batch 1/8/64 and prefill of 512/4096 tokens for a Llama 8B shape, SmolLM2's and
a mixture of 64 experts, transformers' eager generate. Weights are random. `share` is the time that
reading weights and KV once would take at the measured bandwidth, over the time taken; of experts,
as many weights as tokens that choose at random are expected to need. A part that fails says so and
the rest goes on. Everything is written to benchmarks/results/gpu_<device>_<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_host import measure_host_layers
from gpu_models import (
    FORMATS,
    LLAMA_8B,
    MOE_7B,
    SMOLLM2_135M,
    TINY,
    TINY_MOE,
    bytes_read_in_decode,
    decode_batch,
    distinct_experts,
    random_decoder,
    random_weight,
    some_tokens,
    transformers_model,
)

from shoal.core.model_spec import ModelSpec
from shoal.core.split import whole
from shoal.core.step import BLOCK_SIZE
from shoal.kernels import KernelSet, RaggedBatch, select
from shoal.kernels.quantized import QuantizedWeight
from shoal.model.decoder import Decoder
from shoal.worker.graphs import DecodeGraphs
from shoal.worker.kv_pool import KVPool, allocate, token_bytes

ROOT = Path(__file__).parents[1]

_BEYOND_CACHE_BYTES = 1 << 29
_TEST_LIMIT_S = 1200


@dataclass
class Run:
    """Where it runs, how large, and what was found."""

    device: torch.device
    kernels: KernelSet
    smoke: bool
    bandwidth: float = 0.0
    sections: dict[str, Any] = field(default_factory=dict)
    table: list[tuple[str, str]] = field(default_factory=list)

    def section(self, name: str, body: Callable[[], None]) -> None:
        """Run a part; what it raises is a line of the table."""
        started_s = time.perf_counter()
        try:
            body()
        except Exception as error:  # noqa: BLE001 - whatever fails, the rest goes on
            self.sections[f"{name}: error"] = traceback.format_exc()
            first_line = (str(error).splitlines() or [""])[0]
            self.table.append((name, f"FAILED {type(error).__name__}: {first_line[:90]}"))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        sys.stderr.write(f"{name}: {time.perf_counter() - started_s:.1f} s\n")

    def note(self, name: str, text: str, **numbers: Any) -> None:
        self.sections[name] = numbers
        self.table.append((name, text))

    def seconds(self, call: Callable[[], Any], budget_s: float = 0.5) -> float:
        """Median seconds of one call, several in a row between two events."""
        call()
        once_s = max(self._timed(call, 1), 1e-6)
        repeats = max(1, min(200, int(budget_s / 5 / once_s))) if not self.smoke else 1
        return statistics.median(self._timed(call, repeats) / repeats for _ in range(5))

    def _timed(self, call: Callable[[], Any], repeats: int) -> float:
        self._synchronize()
        started_s = time.perf_counter()
        for _ in range(repeats):
            call()
        self._synchronize()
        return time.perf_counter() - started_s

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def use_cuda_kernels(run: Run) -> None:
    run.kernels = select("cuda")


def measure_bandwidth(run: Run) -> None:
    """Bytes read and written per second: the better of a copy and a sum, the bound we hold to."""
    size = 1 << (20 if run.smoke else 32)
    source = torch.ones(size // 4, dtype=torch.float32, device=run.device)
    target = torch.empty_like(source)
    copy = 2 * size / run.seconds(lambda: target.copy_(source))
    read = size / run.seconds(source.sum)
    run.bandwidth = max(copy, read)
    run.note(
        "bandwidth", f"copy {copy / 1e9:.0f}, read {read / 1e9:.0f} GB/s", copy=copy, read=read
    )


def copy_layers(run: Run) -> None:
    text, found = measure_host_layers(run.device, 1 << (16 if run.smoke else 28))
    run.note("layers in host memory", text, **found)


def check_kernels(run: Run) -> None:
    names = ("test_cuda_kernels", "test_cuda_decoder", "test_cuda_experts")
    tests = [f"tests/reference/{name}.py" for name in names]
    options = ["--collect-only"] if run.smoke else ["-m", "gpu"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.getenv('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=_TEST_LIMIT_S,
    )
    lines = result.stdout.strip().splitlines() or ["no output", result.stderr[-200:]]
    failed = [line for line in lines if line.startswith("FAILED")]
    run.note("kernel tests", lines[-1], failed=failed, output=result.stdout[-8000:])


def time_products(run: Run, rows: int, columns: int) -> None:
    """One weight by 1 to 64 tokens; in few bits and for 1 or 2, with either kernel."""
    for weight_format in FORMATS:
        first = random_weight(weight_format, rows, columns, run.device)
        # More of them than the cache holds, in turn.
        count = 1 if run.smoke else -(-_BEYOND_CACHE_BYTES // first.nbytes)
        weights = [first, *(copy_of(first) for _ in range(count - 1))]
        found: dict[str, float] = {}
        for num_tokens in (1, 2, 8, 64):
            x = torch.randn(num_tokens, columns, device=run.device).bfloat16()
            products = {str(num_tokens): run.kernels.linear}
            if num_tokens <= 2 and run.kernels.name == "cuda" and weight_format != "bf16":
                products.update(rivals(num_tokens))
            for name, product in products.items():
                turn = itertools.cycle(weights)
                time_s = run.seconds(partial(_product_of_next, product, x, turn), 0.2)
                found[name] = first.nbytes / time_s / run.bandwidth
        text = ", ".join(f"{key}: {share:.0%}" for key, share in found.items())
        run.note(f"linear {weight_format} {rows}x{columns}", f"share at tokens {text}", **found)


def _product_of_next(product: Callable[..., Any], x: torch.Tensor, weights: Iterator[Any]) -> None:
    product(x, next(weights), None)


def copy_of(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedWeight:
    if isinstance(weight, torch.Tensor):
        return weight.clone()
    return replace(weight, codes=weight.codes.clone(), scales_FG=weight.scales_FG.clone())


def rivals(num_tokens: int) -> dict[str, Callable[..., torch.Tensor]]:
    """What `linear` chooses between: is the border between them right here?"""
    from shoal.kernels.triton.linear_tiles import tiles_linear
    from shoal.kernels.triton.linear_vector import vector_linear

    return {f"{num_tokens} vector": vector_linear, f"{num_tokens} tiles": tiles_linear}


def time_attention(run: Run, spec: ModelSpec, batch: int, context: int) -> None:
    made, num_blocks = decode_batch(batch, context, run.device)
    layers = allocate(spec, whole(spec), num_blocks, torch.bfloat16, run.device).cache.layers
    turn = itertools.cycle(layers)  # together they are beyond the cache
    q = torch.randn(batch, spec.num_heads, spec.head_dim, device=run.device).bfloat16()

    def attend() -> None:
        run.kernels.attention(q, next(turn), made, scale=0.1, window=None, softcap=None)

    share = 2 * layers[0].keys_NBHD.nbytes / run.seconds(attend, 0.2) / run.bandwidth
    run.note(
        f"attention batch {batch}, context {context}", f"share {share:.0%} (eager)", share=share
    )


def time_decode(
    run: Run, name: str, decoder: Decoder, kv: KVPool, batch: int, context: int
) -> None:
    """A decode step as the worker runs it: inputs copied, graph replayed, best token taken."""
    made, _ = decode_batch(batch, context, run.device)
    token_ids = some_tokens(batch, decoder.spec, run.device)
    if decoder.fits_cuda_graphs:
        graphs = DecodeGraphs(decoder, kv, max_num_seqs=batch, max_model_len=context)
        graphs.sizes = (batch,)
        graphs.record_all()
        time_s = run.seconds(lambda: graphs.logits(token_ids, made).argmax(-1))
    else:
        time_s = run.seconds(
            lambda: decoder.logits(decoder.forward(token_ids, made, kv.cache)).argmax(-1)
        )
    kv_bytes = batch * context * token_bytes(decoder.spec, decoder.shard, torch.bfloat16)
    share = (bytes_read_in_decode(decoder, batch) + kv_bytes) / run.bandwidth / time_s
    text = f"{time_s * 1e3:.2f} ms, {batch / time_s:,.0f} tok/s, share {share:.0%}"
    more: dict[str, float] = {}
    if decoder.expert_counts is not None:
        decoder.expert_counts.zero_()
        decoder.forward(token_ids, made, kv.cache)
        used = float((decoder.expert_counts > 0).sum(1).float().mean())
        more = {"experts_expected": distinct_experts(decoder.spec, batch), "experts_used": used}
        text += f", experts {used:.1f} (expected {more['experts_expected']:.1f})"
    run.note(
        f"{name} decode, batch {batch}",
        text,
        step_s=time_s,
        tokens_per_s=batch / time_s,
        share=share,
        **more,
    )


def time_prefill(run: Run, name: str, decoder: Decoder, kv: KVPool, num_tokens: int) -> None:
    positions = torch.arange(num_tokens, device=run.device)
    token_ids = some_tokens(num_tokens, decoder.spec, run.device)

    def prefill() -> None:
        made = RaggedBatch(
            positions_T=positions,
            slots_T=positions,
            query_lens=(num_tokens,),
            context_lens=(num_tokens,),
            block_tables_RB=torch.arange(-(-num_tokens // BLOCK_SIZE), device=run.device)[None],
        )
        hidden = decoder.forward(token_ids, made, kv.cache)
        decoder.logits(hidden[-1:]).argmax(-1)

    time_s = run.seconds(prefill)
    run.note(
        f"{name} prefill {num_tokens}",
        f"{time_s * 1e3:.1f} ms, {num_tokens / time_s:,.0f} tok/s",
        time_s=time_s,
        tokens_per_s=num_tokens / time_s,
    )


def time_model(run: Run, name: str, spec: ModelSpec, formats: tuple[str, ...]) -> None:
    batches, prefills, context = (1, 8, 64), (512, 4096), 512
    if run.smoke:
        batches, prefills, context = (1, 3), (32,), 40
    num_blocks = max(max(batches) * -(-context // BLOCK_SIZE), max(prefills) // BLOCK_SIZE)
    for weight_format in formats:
        decoder = random_decoder(spec, weight_format, run.kernels, run.device)
        kv = allocate(spec, whole(spec), num_blocks, torch.bfloat16, run.device)
        label = f"{name} {weight_format}"
        for batch in batches:
            run.section(
                f"{label} decode, batch {batch}",
                partial(time_decode, run, label, decoder, kv, batch, context),
            )
        for num_tokens in prefills:
            run.section(
                f"{label} prefill {num_tokens}",
                partial(time_prefill, run, label, decoder, kv, num_tokens),
            )
        decoder = kv = None  # before the next one is made


def time_transformers(run: Run, name: str, spec: ModelSpec) -> None:
    """Seconds for a token of eager generate: of 48 tokens less of 16, so prefill drops out."""
    try:
        model = transformers_model(spec, run.device)
    except ImportError:
        run.note(f"{name} transformers", "skipped: transformers is not installed")
        return
    few, many, context = (1, 3, 8) if run.smoke else (16, 48, 512)
    for batch in (1,) if run.smoke else (1, 8, 64):
        prompt = some_tokens(batch * context, spec, run.device).view(batch, context)

        def generate(count: int, prompt: torch.Tensor = prompt) -> None:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

        times = []
        generate(few)
        for _ in range(3):
            short_s = run._timed(lambda: generate(few), 1)
            times.append((run._timed(lambda: generate(many), 1) - short_s) / (many - few))
        step_s = max(statistics.median(times), 1e-9)
        ours = run.sections.get(f"{name} bf16 decode, batch {batch}", {}).get("step_s")
        ratio = f", ours in bf16 is {step_s / ours:.1f} times as fast" if ours else ""
        run.note(
            f"{name} transformers, batch {batch}",
            f"{step_s * 1e3:.2f} ms, {batch / step_s:,.0f} tok/s{ratio}",
            step_s=step_s,
            ratio=step_s / ours if ours else None,
        )


def report(run: Run, label: str, output: Path | None) -> None:
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    path = output or ROOT / "benchmarks" / "results" / f"gpu_{slug}_{date}.json"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    ).stdout.strip()
    found = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "device": label,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "smoke": run.smoke,
        "bandwidth_bytes_per_s": run.bandwidth,
        "sections": run.sections,
        "table": run.table,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    width = max(len(name) for name, _ in run.table)
    sys.stdout.write(f"{label}, torch {torch.__version__}, commit {commit}\n")
    for name, text in run.table:
        sys.stdout.write(f"{name.ljust(width)}  {text}\n")
    sys.stdout.write(f"written to {path}\n")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--skip-tests", action="store_true", help="if they have just been run")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here; --smoke tests the script itself on a CPU")
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    run = Run(device, select("reference"), args.smoke)
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        run.section("kernels", partial(use_cuda_kernels, run))
    label = "smoke" if args.smoke else torch.cuda.get_device_name(device)
    models = {"llama-8b": LLAMA_8B, "smollm2-135m": SMOLLM2_135M, "moe-7b": MOE_7B}
    if args.smoke:
        models = {"tiny": TINY, "tiny-moe": TINY_MOE}
    run.section("bandwidth", partial(measure_bandwidth, run))
    run.section("layers in host memory", partial(copy_layers, run))
    if not args.skip_tests:
        run.section("kernel tests", partial(check_kernels, run))
    rows, columns = (64, 128) if args.smoke else (14336, 4096)
    run.section("products", partial(time_products, run, rows, columns))
    for batch, context in ((1, 64),) if args.smoke else ((1, 4096), (8, 4096), (64, 1024)):
        spec = next(iter(models.values()))
        run.section(f"attention {batch}", partial(time_attention, run, spec, batch, context))
    for name, spec in models.items():
        formats = FORMATS if name != "smollm2-135m" else ("bf16",)
        run.section(name, partial(time_model, run, name, spec, formats))
        if not args.skip_transformers:
            run.section(f"{name} transformers", partial(time_transformers, run, name, spec))
    report(run, label, args.output)


if __name__ == "__main__":
    main()
