"""Compiles the CUDA kernels for GPUs that are not here; run by test_cuda_compiles.py.

    python compile_kernels.py 80 90

Triton needs no GPU to compile, only to be told of one. Each launch becomes a compilation for the
arguments it was given; the compiler then says how much shared memory the kernel takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from kernel_cases import CODES, make_batch, make_kv, make_weight
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from shoal.kernels import ExpertWeights, QuantizedWeight, select
from shoal.kernels.experts import slots
from shoal.kernels.triton import attention_decode, linear_tiles


class PretendDriver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def main(capabilities: list[int]) -> None:
    # What the launchers would find on a GPU.
    attention_decode._PROCESSORS_OF_INTERPRETER = 132
    linear_tiles._PROCESSORS_OF_INTERPRETER = 132
    for capability in capabilities:
        driver.set_active(PretendDriver(capability))

        def compile_only(self: Any, grid: Any, capability: int = capability) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                compiled = self.warmup(*args, grid=grid, **options)
                found = {
                    "capability": capability,
                    "kernel": self.fn.__name__,
                    "shared_bytes": compiled.metadata.shared,
                    "has_code": bool(compiled.asm["cubin"]),
                }
                sys.stdout.write(json.dumps(found) + "\n")

            return launch

        JITFunction.__getitem__ = compile_only
        launch_everything()


def launch_everything() -> None:
    kernels, dtype = select("cuda"), torch.bfloat16
    rows = [(1, 400), (40, 80)]
    for heads, codes, window, softcap in (
        ((32, 8, 128), "plain", None, None),
        ((14, 2, 64), "fp8", None, None),
        ((4, 1, 256), "plain", 512, 50.0),
    ):
        batch = make_batch(rows, "cpu")
        kv = make_kv(rows, *heads[1:], dtype, CODES[codes], "cpu")
        q = torch.zeros(41, heads[0], heads[2], dtype=dtype)
        kernels.attention(q, kv, batch, scale=0.1, window=window, softcap=softcap)
    assert kernels.rope_and_store is not None
    batch, angle = make_batch([(3, 20)], "cpu"), torch.zeros(3, 1, 128)
    for codes in CODES:
        kv = make_kv([(3, 20)], 8, 128, dtype, CODES[codes], "cpu")
        qkv = torch.zeros(3, 48 * 128, dtype=dtype)
        kernels.rope_and_store(qkv, torch.zeros(40, 128), 1e-5, angle, angle, kv, batch)
    x = torch.zeros(4, 4096, dtype=dtype)
    assert kernels.add_rms_norm is not None
    kernels.rms_norm(x, torch.zeros(4096), 1e-5)
    kernels.add_rms_norm(x, x, torch.zeros(4096), 1e-5)
    kernels.gated_activation(x, "gelu_tanh")
    for weight_format, num_tokens in (("int4", 1), ("fp8", 1), ("int4", 64), ("int8", 8)):
        weight = make_weight(weight_format, 4096, 4096, 32, device="cpu")  # type: ignore[arg-type]
        kernels.linear(torch.zeros(num_tokens, 4096, dtype=dtype), weight, None)
    launch_experts()
    weight = make_weight("int4", 64, 4096, 32, device="cpu", minimums=True)
    kernels.linear(torch.zeros(300, 4096, dtype=dtype), weight, None)


def launch_experts() -> None:
    """A quarter of the experts of a Qwen3-MoE, for a few tokens and for many."""
    kernels, held = select("cuda"), 32
    rules = {"num_active": 8, "renormalises": True, "scale": 1.0}
    at, places = torch.tensor(7), slots(128, [(expert, 0, 1 << 16) for expert in range(held)])
    for weight_format in (None, "int4"):
        experts = ExpertWeights(
            places, *(stack(weight_format, *shape) for shape in ((1536, 2048), (2048, 768)))
        )
        for num_tokens in (1, 200):
            x = torch.zeros(num_tokens, 2048, dtype=torch.bfloat16)
            router = torch.zeros(128, 2048)
            chosen = kernels.route(x, router, **rules, num_groups=8, num_active_groups=3)  # type: ignore[arg-type]
            kernels.experts(x, *chosen, experts, at, "silu")


def stack(weight_format: str | None, rows: int, columns: int) -> torch.Tensor | QuantizedWeight:
    if weight_format is None:
        return torch.zeros(32 * rows, columns, dtype=torch.bfloat16)
    return make_weight(weight_format, 32 * rows, columns, 32, device="cpu")  # type: ignore[arg-type]


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
