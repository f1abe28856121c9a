"""Checks of GPUs and their driver: versions, precisions, memory, power, heat.

Knows nothing of what joins them (gpu_links.py) or of where facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.cluster.topology import POWER_CAP, Gpu, Topology
from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, fail, gigabytes, ok, skipped, warn

_NO_GPU = "no NVIDIA GPU is visible here"
_FREE_SHARE, _POWER_SHARE = 0.9, 0.95
_TRITON, _BF16, _FP8 = (7, 0), (8, 0), (8, 9)
_LEAST_CUDA_13 = (7, 5)


def _driver(machine: Machine) -> Iterator[Verdict]:
    topology, software = machine.topology, machine.software
    if topology.driver_problem:
        yield fail(
            f"the driver does not answer: {topology.driver_problem}",
            "reboot after a driver update, so that kernel module and libraries are of one version",
        )
    elif topology.undriven:
        yield fail(
            f"NVIDIA's GPU at {', '.join(topology.undriven)}, and no driver answers",
            "install NVIDIA's driver; in a container: docker run --gpus all",
        )
    elif not topology.gpus and not topology.lost:
        yield skipped(_without(topology))
    elif software.torch_problem:
        yield fail(
            f"torch cannot be loaded: {software.torch_problem}",
            "install torch for this driver: pip install --force-reinstall torch",
        )
    elif software.torch_cuda is None:
        yield fail(
            f"driver {topology.driver}, but torch {software.torch} is a CPU build",
            "install the CUDA build: pip install --force-reinstall torch, from PyPI",
        )
    else:
        yield from _cuda_versions(machine, software.torch_cuda)
    for each in topology.lost:
        yield fail(
            f"the driver counts GPU {each}, and cannot speak to it",
            "see `dmesg | grep Xid`, its power and riser; then reboot",
        )


def _without(topology: Topology) -> str:
    if not topology.foreign:
        return _NO_GPU
    return f"{_NO_GPU}; {', '.join(topology.foreign)}: shoal has no kernels for it, its CPU serves"


def _cuda_versions(machine: Machine, wanted: tuple[int, int]) -> Iterator[Verdict]:
    """Older drivers run newer CUDA of their major version (NVIDIA: minor version compatibility)."""
    topology = machine.topology
    needs = f"{wanted[0]}.{wanted[1]}"
    if topology.driver_cuda is None:
        yield skipped(f"driver {topology.driver} does not say which CUDA it runs")
        return
    runs = f"{topology.driver_cuda[0]}.{topology.driver_cuda[1]}"
    if wanted[0] > topology.driver_cuda[0]:
        yield fail(
            f"torch wants CUDA {needs}; driver {topology.driver} runs up to {runs}",
            f"update the driver, or install torch for CUDA {topology.driver_cuda[0]}",
        )
    else:
        yield ok(f"driver {topology.driver} runs CUDA {runs}; torch wants {needs}")


def _kernels(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
    elif machine.software.has_triton:
        yield ok("triton is installed")
    else:
        yield warn("triton is not installed: GPUs would run plain PyTorch", "pip install triton")


def _precisions(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
    needs_13 = (machine.software.torch_cuda or (0, 0))[0] >= 13
    for gpu in machine.topology.gpus:
        found = gpu.compute_capability
        if found is None:
            yield skipped(f"{_name(gpu)} does not say what it is capable of")
        elif found < _TRITON or (needs_13 and found < _LEAST_CUDA_13):
            least = _LEAST_CUDA_13 if needs_13 else _TRITON
            yield fail(
                f"{_name(gpu)} has compute capability {found[0]}.{found[1]}; this torch and its "
                f"kernels need {least[0]}.{least[1]}",
                "leave it out of plans, or install torch for CUDA 12"
                if found >= _TRITON
                else "leave it out of plans",
            )
        elif found < _BF16:
            yield warn(
                f"{_name(gpu)} has no bfloat16 (and no fp8)",
                "serve on it with --dtype float16, or --quantize int8",
            )
        elif found < _FP8:
            yield ok(f"{_name(gpu)} has bfloat16 and int8; no fp8: use --quantize int8 for 8 bits")
        else:
            yield ok(f"{_name(gpu)} has bfloat16, int8 and fp8")


def _memory(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
    for gpu in machine.topology.gpus:
        found = f"{_name(gpu)}: {gigabytes(gpu.free_bytes)} of {gigabytes(gpu.memory_bytes)} free"
        if not gpu.memory_bytes:
            yield skipped(f"{_name(gpu)} does not say how much memory it has")
        elif gpu.free_bytes < _FREE_SHARE * gpu.memory_bytes:
            yield warn(
                found, "end what else runs there (nvidia-smi names it), or plan for the rest"
            )
        else:
            yield ok(found)


def _power(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
    for gpu in machine.topology.gpus:
        limit, usual = gpu.power_limit_w, gpu.default_power_limit_w
        if limit is None or usual is None:
            yield skipped(f"{_name(gpu)} does not say its power limit")
        elif limit < _POWER_SHARE * usual:
            yield warn(
                f"{_name(gpu)} may take {limit:.0f} W; its maker gives it {usual:.0f} W",
                f"nvidia-smi -i {gpu.index} -pl {usual:.0f}, or probe it as it is and plan by that",
            )
        else:
            yield ok(f"{_name(gpu)} may take {limit:.0f} W")


def _held_back(machine: Machine) -> Iterator[Verdict]:
    """Reaching its own power cap is what a busy GPU does."""
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
    for gpu in machine.topology.gpus:
        reasons = [each for each in gpu.held_back if each != POWER_CAP]
        heat = "" if gpu.temperature_c is None else f", at {gpu.temperature_c} °C"
        if any("application clocks" in each for each in reasons):
            yield warn(
                f"{_name(gpu)} is held at application clocks, below what it could run at",
                f"nvidia-smi -i {gpu.index} --reset-gpu-clocks, and -rac for application clocks",
            )
        elif reasons:
            yield warn(
                f"{_name(gpu)} is slowed down by {', '.join(reasons)}{heat}",
                "see to its cooling and power supply, and probe it again",
            )
        else:
            yield ok(f"nothing slows {_name(gpu)} down{heat}")


def _persistence(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
        return
    off = [gpu for gpu in machine.topology.gpus if gpu.is_persistent is False]
    if off:
        yield warn(
            f"the driver lets go of {', '.join(_name(gpu) for gpu in off)} when nobody uses them",
            "nvidia-smi -pm 1 (or the service nvidia-persistenced)",
        )
    elif any(gpu.is_persistent is None for gpu in machine.topology.gpus):
        yield skipped("the driver does not say whether it stays loaded (under Windows it does)")
    else:
        yield ok("the driver stays loaded between runs")


def _mig(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
        return
    cut = [gpu for gpu in machine.topology.gpus if gpu.has_mig]
    if cut:
        yield warn(
            f"{', '.join(_name(gpu) for gpu in cut)} are cut into MIG instances",
            "give each instance a replica or a stage of its own: they cannot share layers",
        )
    else:
        yield ok("no GPU is cut into MIG instances")


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


GPU_CHECKS: tuple[Check[Machine], ...] = (
    Check("gpu driver", "torch, driver and kernel module must fit each other", _driver),
    Check("gpu kernels", "shoal's kernels for GPUs are written in Triton", _kernels),
    Check(
        "gpu precisions",
        "a precision without hardware for it is emulated, or refused when the plan starts",
        _precisions,
    ),
    Check("gpu memory", "weights and KV must fit what is free, not what is built in", _memory),
    Check("gpu power", "a GPU under its usual power limit is slower than its name says", _power),
    Check("gpu clocks", "a GPU that is slowed down holds back all that wait for it", _held_back),
    Check(
        "gpu persistence",
        "a driver that is loaded anew costs seconds, and forgets limits and clocks",
        _persistence,
    ),
    Check("gpu instances", "NCCL does not join MIG instances of one GPU", _mig),
)
