"""How a model is computed here: kernels, and precision of weights, activations and KV.

    kernels auto    the compiled CPU path, or the CUDA kernels; plain torch where they cannot,
                    with one warning
    dtype auto      bfloat16 where it is fast
    quantize auto   as the checkpoint has it, if dtype is auto too and the kernels gain by it

Knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions, Quantization
from shoal.kernels import KernelSet, select
from shoal.kernels.cpu.layers import KV_DTYPES, MAX_HEAD_DIM
from shoal.kernels.cpu.step import Session
from shoal.worker.device import DeviceChoice, choose_dtype
from shoal.worker.kv_pool import kv_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compute:
    """What was settled; `label` of the kernels is for people."""

    kernels: KernelSet | Session
    label: str
    dtype: torch.dtype
    quantize: Quantization
    kv_dtype: torch.dtype

    @property
    def digest(self) -> str:
        """What, beside the checkpoint, the bytes of the KV follow from."""
        return f"{self.label}/{self.dtype}/{self.quantize}/{self.kv_dtype}"

    def arithmetic_on(self, choice: DeviceChoice) -> str:
        """Ranks that say the same make the same bits, of sums that a choice of experts depends on.

        The compiled kernels make those alike on every machine. In torch they follow from
        instructions and threads, too.
        """
        if isinstance(self.kernels, Session):
            return "compiled"
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"{self.label}/{self.dtype}/{choice.label}/{instructions}"


def choose_compute(options: EngineOptions, spec: ModelSpec, device: torch.device) -> Compute:
    """Settle everything "auto".

    Raises:
        ConfigError: a combination that does not exist, or kernels this machine lacks.
    """
    on_cpu = device.type == "cpu"
    kernels = _cpu_kernels(options, spec) if on_cpu else _cuda_kernels(options)
    compiled = isinstance(kernels, Session)
    dtype = choose_dtype(device, options.dtype, compiled=compiled)
    quantize = options.quantize
    if quantize == "auto" and (options.dtype != "auto" or _is_plain(kernels)):
        quantize = "none"
    if quantize == "fp8" and on_cpu:
        raise ConfigError("--quantize fp8 needs a GPU that has fp8; use int8 on a CPU")
    label = f"compiled, {kernels.isa}" if isinstance(kernels, Session) else kernels.name
    return Compute(kernels, label, dtype, quantize, kv_dtype(options.kv_cache_dtype, dtype))


def _cpu_kernels(options: EngineOptions, spec: ModelSpec) -> KernelSet | Session:
    if options.kernels == "cuda":
        raise ConfigError("--kernels cuda needs an NVIDIA GPU; use --kernels auto on a CPU")
    if options.kernels == "reference":
        return select("reference")
    reason = _why_not_compiled(options, spec)
    if reason is None:
        try:
            return Session(options.num_threads or torch.get_num_threads())
        except OSError as error:
            reason = str(error)
    if options.kernels == "cpu":
        raise ConfigError(f"--kernels cpu: {reason}")
    log.warning("running on plain torch, several times slower: %s", reason)
    return select("reference")


def _why_not_compiled(options: EngineOptions, spec: ModelSpec) -> str | None:
    if options.dtype == "float16":
        return "the compiled CPU kernels have no float16; use --dtype bfloat16"
    if options.kv_cache_dtype != "auto":
        dtype = kv_dtype(options.kv_cache_dtype, torch.float32)
        if dtype not in KV_DTYPES:
            return (
                f"the compiled CPU kernels keep no {options.kv_cache_dtype} KV; use "
                "--kv-cache-dtype int8 or bfloat16"
            )
    if spec.latent is not None:
        return "the compiled CPU kernels have no latent attention"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"the compiled CPU kernels take heads of up to {MAX_HEAD_DIM}"
    return None


def _cuda_kernels(options: EngineOptions) -> KernelSet:
    if options.kernels == "cpu":
        raise ConfigError("--kernels cpu runs on a CPU; say --device cpu too")
    if options.kernels == "reference":
        return select("reference")
    try:
        return select("cuda")
    except ImportError as error:
        if options.kernels == "cuda":
            raise ConfigError(f"--kernels cuda: {error}; install triton") from error
        log.warning("running on plain torch, slower: %s; install triton", error)
        return select("reference")


def _is_plain(kernels: KernelSet | Session) -> bool:
    return isinstance(kernels, KernelSet) and kernels.name == "reference"
