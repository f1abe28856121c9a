"""Checks of several machines that are to work together: what must be alike, and is not.

Knows nothing of where facts come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, fail, ok, skipped, warn

Machines = Sequence[Machine]

_FOR_ONE_MACHINE = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")


def _programs(machines: Machines) -> Iterator[Verdict]:
    for what, of in (
        ("shoal", lambda machine: machine.software.shoal),
        ("Ray", lambda machine: machine.software.ray or "not installed"),
        ("Python", lambda machine: ".".join(machine.software.python.split(".")[:2])),
    ):
        yield _alike(machines, what, of, fail, "install the same version on all of them")
    yield _alike(
        machines,
        "torch",
        lambda machine: machine.software.torch,
        warn,
        "install the same version on all of them",
    )


def _drivers(machines: Machines) -> Iterator[Verdict]:
    with_gpus = [machine for machine in machines if machine.topology.gpus]
    if len(with_gpus) < 2:
        yield skipped("there are no two machines with GPUs")
        return
    yield _alike(
        with_gpus,
        "driver",
        lambda machine: machine.topology.driver.partition(".")[0],
        warn,
        "update the older ones to the newest branch among them",
    )


def _variables(machines: Machines) -> Iterator[Verdict]:
    names = sorted(
        {
            name
            for machine in machines
            for name in (
                *machine.variables,
                *(key for each in machine.files.values() for key in each),
            )
            if name.startswith("NCCL_") and name not in _FOR_ONE_MACHINE
        }
    )
    different = [name for name in names if len({each.variable(name) for each in machines}) > 1]
    for name in different:
        said = ", ".join(f"{each.name}: {each.variable(name) or 'not set'}" for each in machines)
        yield warn(f"{name} differs ({said})", f"unset {name}, or set it alike everywhere")
    if not different:
        yield ok("NCCL's variables are alike")


def _frames(machines: Machines) -> Iterator[Verdict]:
    sizes = {
        machine.name: max(nics, key=lambda nic: nic.bytes_per_s or 0.0).mtu
        for machine in machines
        if (nics := machine.topology.network_cards)
    }
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name}: {mtu}" for name, mtu in sizes.items())
        yield warn(f"frames differ ({said})", "set the same MTU on all machines of a network")
    else:
        yield ok("frames are of one size" if sizes else "no machine has a network card that is up")


def _alike(
    machines: Machines,
    what: str,
    of: Callable[[Machine], str],
    complain: Callable[[str, str], Verdict],
    remedy: str,
) -> Verdict:
    found = {machine.name: of(machine) for machine in machines}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name}: {value}" for name, value in found.items())
        return complain(f"{what} differs ({said})", remedy)
    return ok(f"{what} {next(iter(found.values()))} everywhere")


VERSION_CHECKS: tuple[Check[Machines], ...] = (
    Check("programs", "nodes speak to each other in formats that follow the version", _programs),
    Check("drivers", "the same torch, CUDA and NCCL must run under all of them", _drivers),
    Check(
        "nccl variables", "ranks that choose differently wait for each other for ever", _variables
    ),
    Check("frames alike", "a larger frame than the other end takes is lost", _frames),
)
