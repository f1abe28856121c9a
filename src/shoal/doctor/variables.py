"""Checks of variables that NCCL, OpenMP, CUDA and torch read: what was set once and hurts now.

NVIDIA's own words on most of NCCL's: for debugging, and not to be kept. Knows nothing of where
facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, ok, warn

_TUNING = (
    *("NCCL_PROTO", "NCCL_ALGO", "NCCL_NTHREADS", "NCCL_BUFFSIZE", "NCCL_MIN_NCHANNELS"),
    *("NCCL_MAX_NCHANNELS", "NCCL_LL_BUFFSIZE", "NCCL_LL128_BUFFSIZE"),
)
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for each kernel",
    "NCCL_BLOCKING_WAIT": "the host waits for each collective",
    "TORCH_NCCL_BLOCKING_WAIT": "the host waits for each collective",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "the driver is asked for each tensor's memory",
}
_LOUD = {
    "NCCL_DEBUG": ("INFO", "TRACE"),
    "TORCH_DISTRIBUTED_DEBUG": ("INFO", "DETAIL"),
}
_BINDINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_UNBOUND = ("", "false", "disabled", "none")


def _tuning(machine: Machine) -> Iterator[Verdict]:
    found = [name for name in _TUNING if machine.variable(name)]
    for name in found:
        yield warn(f"{name}={machine.variable(name)}{_place(machine, name)}", _unset(machine, name))
    if not found:
        yield ok("NCCL chooses protocol, algorithm and channels by itself")


def _transports(machine: Machine) -> Iterator[Verdict]:
    """Without peers there is nothing that NCCL_P2P_DISABLE takes away."""
    off = []
    peers = any(pair.peer_to_peer for pair in machine.topology.pairs)
    level = machine.variable("NCCL_P2P_LEVEL").upper()
    if peers and machine.has("NCCL_P2P_DISABLE"):
        off.append("NCCL_P2P_DISABLE")
    if peers and level in ("LOC", "0"):
        off.append("NCCL_P2P_LEVEL")
    if machine.has("NCCL_SHM_DISABLE"):
        off.append("NCCL_SHM_DISABLE")
    for name in off:
        yield warn(f"{name}={machine.variable(name)}{_place(machine, name)}", _unset(machine, name))
    if not off:
        yield ok("no way between GPUs of this machine is switched off")


def _debugging(machine: Machine) -> Iterator[Verdict]:
    loud = [
        name
        for name, values in _LOUD.items()
        if machine.variable(name).upper().partition(":")[0] in values
    ]
    slow = [name for name in _SLOW if machine.has(name)]
    for name in loud:
        yield warn(f"{name}={machine.variable(name)}{_place(machine, name)}", _unset(machine, name))
    for name in slow:
        yield warn(f"{name} is set: {_SLOW[name]}", _unset(machine, name))
    if not loud and not slow:
        yield ok("nothing is set that is for debugging")


def _threads(machine: Machine) -> Iterator[Verdict]:
    cpus, said = machine.processor.num_cpus, machine.variables.get("OMP_NUM_THREADS", "")
    first = said.partition(",")[0].strip()
    if not first.isdigit():
        yield ok("OMP_NUM_THREADS is not set: shoal shares the CPUs out itself")
    elif int(first) > cpus:
        yield warn(f"OMP_NUM_THREADS={said} on {cpus} CPUs", "unset OMP_NUM_THREADS")
    elif int(first) * 2 <= cpus:
        yield warn(
            f"OMP_NUM_THREADS={said} on {cpus} CPUs: `LLM` in Python takes no more threads",
            "unset OMP_NUM_THREADS, or say num_threads=",
        )
    else:
        yield ok(f"OMP_NUM_THREADS={said} on {cpus} CPUs")


def _binding(machine: Machine) -> Iterator[Verdict]:
    found = [
        name
        for name in _BINDINGS
        if machine.variables.get(name, "").strip().lower() not in _UNBOUND
    ]
    for name in found:
        yield warn(f"{name}={machine.variables[name]}", f"unset {name}")
    if not found:
        yield ok("threads may run on any CPU")


def _spinning(machine: Machine) -> Iterator[Verdict]:
    found = []
    if machine.variables.get("OMP_WAIT_POLICY", "").lower() == "active":
        found.append("OMP_WAIT_POLICY")
    block = machine.variables.get("KMP_BLOCKTIME", "").lower()
    if block == "infinite" or (block.isdigit() and int(block) > 1000):
        found.append("KMP_BLOCKTIME")
    if machine.variables.get("GOMP_SPINCOUNT", "").lower() in ("infinite", "infinity"):
        found.append("GOMP_SPINCOUNT")
    for name in found:
        yield warn(f"{name}={machine.variables[name]}", f"unset {name}")
    if not found:
        yield ok("threads that have nothing to do go to sleep")


def _place(machine: Machine, name: str) -> str:
    """Which of NCCL's files says so, where it is not the environment."""
    if name in machine.variables:
        return ""
    return "".join(f" (in {path})" for path, values in machine.files.items() if name in values)


def _unset(machine: Machine, name: str) -> str:
    if name in machine.variables:
        return f"unset {name}"
    return f"remove {name} from the file"


VARIABLE_CHECKS: tuple[Check[Machine], ...] = (
    Check(
        "nccl tuning",
        "NCCL picks these by size and topology; fixed ones are slower at other sizes, and LL128 "
        "where it is not supported corrupts data",
        _tuning,
    ),
    Check("nccl transports", "GPUs then talk through a slower way than they have", _transports),
    Check("debugging", "logs and waiting cost every step", _debugging),
    Check(
        "openmp threads",
        "threads beyond the CPUs wait for each other; fewer leave CPUs idle",
        _threads,
    ),
    Check(
        "openmp binding",
        "each worker would bind its threads to the same first CPUs as all others",
        _binding,
    ),
    Check(
        "openmp spinning",
        "threads that spin take the CPUs of other ranks, engine and server",
        _spinning,
    ),
)
