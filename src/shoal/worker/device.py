"""Which device, which precision, how much memory: settled from what the machine has.

Knows nothing of models beyond their KV bytes per token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from shoal.core.errors import DeviceError
from shoal.core.options import DType
from shoal.worker.memory import free_memory_bytes

log = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_WEIGHTS_SHARE = {"cpu": 0.8, "cuda": 0.9}
_CPU_KV_SHARE = 0.25
_CPU_KV_BYTES = 1 << 30
_CPU_KV_FULL_LENGTH = 2
_CUDA_KV_SHARE = 0.85
_CUDA_MARGIN = 0.03


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A device; `label` is for people."""

    device: torch.device
    label: str


def choose_device(device: str) -> DeviceChoice:
    """Settle "auto", or check what was asked for.

    Raises:
        DeviceError: the device is absent or shoal does not support it.
    """
    chosen = _auto_device() if device == "auto" else _parse(device)
    if chosen.type == "cuda":
        label = torch.cuda.get_device_name(chosen)
    else:
        label = f"CPU, {torch.get_num_threads()} threads"
    return DeviceChoice(chosen, label)


def choose_dtype(device: torch.device, dtype: DType, *, compiled: bool) -> torch.dtype:
    """Settle "auto": 16 bits where they are fast.

    Args:
        compiled: by the compiled CPU kernels, to which bfloat16 is half the memory to read.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    # In torch, without these instructions, bfloat16 is emulated and slower than float32.
    return torch.bfloat16 if compiled or _cpu_has_bf16() else torch.float32


def kv_budget_bytes(
    device: torch.device, share: float, full_length_bytes: int, step_bytes: int | None = None
) -> int:
    """Memory for KV when the user names none.

    CUDA: what the weights and the largest step leave, less 3 %; 85 % of what the weights leave
    where the step was not measured. CPU: 1 GiB, or what two requests of full length need if that
    is more, but a quarter of what is free at most.

    Args:
        share: of the device that is this engine's.
        full_length_bytes: KV of one request of full length.
        step_bytes: what the largest step takes (`worker/peak.py`).
    """
    free = int(free_memory_bytes(device) * share)
    if device.type == "cuda" and step_bytes is not None:
        return max(0, int(free * (1 - _CUDA_MARGIN)) - step_bytes)
    if device.type == "cuda":
        return int(free * _CUDA_KV_SHARE)
    wanted = max(_CPU_KV_BYTES, _CPU_KV_FULL_LENGTH * full_length_bytes)
    return min(int(free * _CPU_KV_SHARE), wanted)


def weights_budget_bytes(device: torch.device, share: float, reserved_bytes: int = 0) -> int:
    """Memory for weights when the user names none; the rest is for KV and for Steps.

    Args:
        reserved_bytes: what is known to be wanted of the rest.
    """
    free = int(free_memory_bytes(device) * share) - reserved_bytes
    return max(0, int(free * _WEIGHTS_SHARE[device.type]))


def _auto_device() -> torch.device:
    if torch.version.hip is not None:
        log.warning("AMD GPUs are not supported yet: running on the CPU")
    elif torch.cuda.is_available():
        return torch.device("cuda", 0)
    elif torch.backends.mps.is_available():
        log.warning("Apple GPUs are not supported yet: running on the CPU")
    return torch.device("cpu")


def _parse(device: str) -> torch.device:
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(
            f"device {device!r} is not a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise DeviceError(
            f"device {device!r} is not supported: shoal runs on NVIDIA GPUs (cuda) and CPUs; "
            f"Apple (mps), Intel (xpu) and other devices are refused for now; use --device cpu"
        )
    if torch.version.hip is not None:
        raise DeviceError(
            "this PyTorch is built for AMD GPUs (ROCm), which shoal does not support yet; "
            "use --device cpu"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            "device cuda was asked for, but PyTorch sees no NVIDIA GPU: the driver is missing, or "
            "this is a CPU build of PyTorch; install the CUDA build, or use --device cpu"
        )
    index = parsed.index or 0
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"device cuda:{index} was asked for; this machine has cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}"
        )
    return torch.device("cuda", index)


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
