"""Checks of CPUs and memory: instructions, kernels, quotas, frequency, NUMA, huge pages.

Knows nothing of GPUs or of where facts come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from shoal.cluster.sysfs import SCALES_BY_ITSELF
from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, fail, gigabytes, ok, skipped, warn

_SLOW_GOVERNORS = {"powersave", "conservative", "userspace"}
_LEAST_FREE, _LEAST_SHARE = 1e9, 0.1
_VECTORS = ("avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx2")


def _kernels(machine: Machine) -> Iterator[Verdict]:
    software = machine.software
    if software.kernels:
        yield ok(f"compiled for this CPU: {software.kernels}")
    elif software.torch_problem:
        yield skipped(f"torch cannot be loaded ({software.torch_problem}), so they can't either")
    elif machine.processor.is_arm:
        yield skipped("they are written for x86, and this CPU is an ARM")
    else:
        yield warn(
            f"there are none: {software.kernels_problem or 'they do not load'}",
            "install g++ and build shoal again: make clean setup",
        )


def _instructions(machine: Machine) -> Iterator[Verdict]:
    flags, model = machine.processor.flags, machine.processor.model or "this CPU"
    if machine.processor.is_arm:
        found = f"{model} is an ARM, which the compiled kernels are not written for"
        yield (
            skipped(f"{found}; its GPUs serve")
            if machine.topology.gpus
            else warn(found, "expect plain PyTorch's speed, or leave this CPU out of plans")
        )
        return
    if not flags:
        yield skipped("the kernel does not list this CPU's instructions")
        return
    has = [each for each in _VECTORS if each in flags]
    if "avx512f" in flags or "avx_vnni" in flags:
        yield ok(f"{model}: {', '.join(has)}")
    elif "avx2" in flags:
        yield warn(
            f"{model} has AVX2, but neither AVX-512 nor VNNI",
            "give it less of prompts than its cores suggest: plan with `shoal probe`'s rates",
        )
    else:
        yield fail(
            f"{model} has no AVX2, which the compiled kernels need",
            "leave this CPU out of plans, or expect plain PyTorch's speed",
        )


def _quota(machine: Machine) -> Iterator[Verdict]:
    cpus, quota = machine.processor.num_cpus, machine.processor.quota_cpus
    if quota is None or quota >= cpus:
        yield ok(f"{cpus} CPUs, and no quota below that")
        return
    yield warn(
        f"{cpus} CPUs are visible, but the control group allows {quota:.3g} CPUs' worth of time",
        f"serve with --num-threads {max(1, math.floor(quota))}, or raise the container's limit",
    )


def _governor(machine: Machine) -> Iterator[Verdict]:
    processor = machine.processor
    if not processor.governors:
        yield skipped("this machine shows no frequency control (virtual machines don't)")
        return
    slow = sorted(_SLOW_GOVERNORS.intersection(processor.governors))
    named = ", ".join(processor.governors)
    if slow and processor.frequency_driver not in SCALES_BY_ITSELF:
        yield warn(
            f"governor {', '.join(slow)} with {processor.frequency_driver or 'no known driver'}",
            "cpupower frequency-set -g performance",
        )
    else:
        yield ok(f"governor {named} with {processor.frequency_driver or 'an unnamed driver'}")


def _numa(machine: Machine) -> Iterator[Verdict]:
    nodes = [node for node in machine.topology.numa if node.cpus]
    if len(nodes) < 2:
        yield ok("one NUMA node" if nodes else "no NUMA nodes are listed")
        return
    sizes = ", ".join(f"{len(each.cpus)} CPUs, {gigabytes(each.memory_bytes)}" for each in nodes)
    yield warn(
        f"{len(nodes)} NUMA nodes ({sizes})",
        "before serving from these CPUs: numactl --interleave=all shoal serve ...",
    )


def _huge_pages(machine: Machine) -> Iterator[Verdict]:
    match machine.memory.huge_pages:
        case None:
            yield skipped("the kernel says nothing of transparent huge pages")
        case "never":
            yield warn(
                "transparent huge pages are off",
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            )
        case other:
            yield ok(f"transparent huge pages: {other}")


def _memory(machine: Machine) -> Iterator[Verdict]:
    memory = machine.memory
    total = memory.limit_bytes or memory.total_bytes
    limited = " that the control group allows" if memory.limit_bytes else ""
    found = f"{gigabytes(memory.available_bytes)} of {gigabytes(total)}{limited} are free"
    if memory.available_bytes < _LEAST_FREE:
        yield fail(found, "end what else holds memory, or give the machine more")
    elif memory.available_bytes < _LEAST_SHARE * total:
        yield warn(found, "end what else holds memory before weights are loaded")
    else:
        yield ok(found)


def _overcommit(machine: Machine) -> Iterator[Verdict]:
    if machine.memory.never_overcommits:
        yield warn("vm.overcommit_memory is 2", "sysctl vm.overcommit_memory=0")
    else:
        yield ok("the kernel lets memory be reserved before it is filled")


PROCESSOR_CHECKS: tuple[Check[Machine], ...] = (
    Check("cpu kernels", "plain PyTorch is several times slower on CPUs", _kernels),
    Check(
        "cpu instructions",
        "prompts are bound by arithmetic: VNNI and AVX-512 do several times as much at once",
        _instructions,
    ),
    Check(
        "cpu quota",
        "threads beyond a quota are all stopped for the rest of each period: Steps stutter",
        _quota,
    ),
    Check("cpu frequency", "a governor that saves power holds every Step back", _governor),
    Check(
        "numa",
        "weights land in the memory of the node that loads them, and others read them slower",
        _numa,
    ),
    Check(
        "huge pages",
        "all weights are read for every token; small pages make the CPU look up addresses, too",
        _huge_pages,
    ),
    Check("memory", "weights and KV must fit what is free, not what is built in", _memory),
    Check(
        "overcommit",
        "weights and KV are reserved in one piece before they are filled",
        _overcommit,
    ),
)
