"""What a user chooses about an engine; None and "auto" are settled where the device is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.core.errors import ConfigError

MAX_STEPS_IN_FLIGHT = 16
MAX_NUM_SEQS = 64
"""Of an engine, where neither a plan nor a flag says it."""

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
Kernels = Literal["auto", "reference", "cpu", "cuda"]
LinkFormat = Literal["exact", "bfloat16", "int8"]
ActivationFormat = Literal["auto", "exact", "bfloat16", "int8"]
Batching = Literal["even", "continuous", "article"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """One engine's settings; names follow vLLM's flags where the meaning is the same.

    Attributes:
        model_path: a folder with safetensors, or a .gguf file.
        fingerprint: content identity of the checkpoint, for block names.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of weights, activations and KV; naming one also undoes a checkpoint's quantisation.
        quantize: precision of the large weights. "auto": as the checkpoint has them if `dtype` is
            "auto" too; "none": in `dtype`.
        kv_cache_dtype: "auto": as `dtype`.
        kernels: "auto": the fastest this machine has.
        max_model_len: None: what the checkpoint was made for, if the KV cache holds it.
        kv_cache_memory_bytes: None: a share of the device's free memory.
        weights_memory_bytes: that weights may take; layers beyond it come from disk, or from host
            memory to a GPU, in every step. None: most of what is free.
        batching: what goes into a Step (`policy/batching.py`).
        tpot_target_s: that chunks of prompts leave to streams that run; None: little more than
            those take alone.
        num_threads: of the CPU; None: all of them.
        device_share: how much of the device's free memory is this engine's.
        activation_format: of hidden states between stages, and of sums that cross a network.
            "auto": as they are computed, or rounded where a slow link makes that worth it.
        expert_redeal: experts move between ranks as their load and the ranks' speeds show.
    """

    model_path: str
    fingerprint: str = ""
    device: str = "auto"
    dtype: DType = "auto"
    quantize: Quantization = "auto"
    kv_cache_dtype: KVCacheDType = "auto"
    kernels: Kernels = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    max_waiting: int = 256
    kv_cache_memory_bytes: int | None = None
    weights_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    max_steps_in_flight: int = 2
    batching: Batching = "even"
    tpot_target_s: float | None = None
    num_threads: int | None = None
    device_share: float = 1.0
    activation_format: ActivationFormat = "auto"
    expert_redeal: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "weights_memory_bytes",
            "max_steps_in_flight",
            "num_threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is {value}; it must be at least 1")
        if self.max_steps_in_flight > MAX_STEPS_IN_FLIGHT:
            raise ConfigError(
                f"max_steps_in_flight is {self.max_steps_in_flight}; at most "
                f"{MAX_STEPS_IN_FLIGHT} are useful"
            )
