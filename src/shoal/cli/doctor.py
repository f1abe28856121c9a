"""`shoal doctor`: best practice as checks of this machine, a cluster file or a plan.

Exit code 0: nothing failed · 1: something did (with --strict: or is to be warned of) · 2: the input
is wrong. Gathers facts, wires checks and report together; judges nothing itself.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from shoal.cli.model_shape import spec_of
from shoal.cli.options import Json
from shoal.cluster.cluster_file import read_cluster
from shoal.core.errors import ConfigError, ShoalError
from shoal.doctor.cluster_file import CLUSTER_CHECKS
from shoal.doctor.facts import Machine, Software
from shoal.doctor.finding import Finding, Status, examine
from shoal.doctor.gather import read_machine
from shoal.doctor.gpu_links import GPU_LINK_CHECKS
from shoal.doctor.gpus import GPU_CHECKS
from shoal.doctor.network import NETWORK_CHECKS
from shoal.doctor.plan import PLAN_CHECKS, place
from shoal.doctor.processor import PROCESSOR_CHECKS
from shoal.doctor.report import as_json, lines, read_report, worst
from shoal.doctor.system import SYSTEM_CHECKS
from shoal.doctor.variables import VARIABLE_CHECKS
from shoal.doctor.versions import VERSION_CHECKS
from shoal.model.cache import models_folder
from shoal.plan_file import read_plan

MACHINE_CHECKS = (
    *PROCESSOR_CHECKS,
    *SYSTEM_CHECKS,
    *GPU_CHECKS,
    *GPU_LINK_CHECKS,
    *NETWORK_CHECKS,
    *VARIABLE_CHECKS,
)
_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def doctor(
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="check this cluster file instead")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="check this plan, on --cluster or what was probed last"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="of the plan; default: what it names")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="FILE",
            help="what `doctor --json` said on another machine: what must be alike is compared",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="that a server is to listen on")
    ] = 8000,
    everything: Annotated[
        bool, typer.Option("--all", help="also what is well, and what was skipped")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 for warnings, too")] = False,
    as_json_text: Json = False,
) -> None:
    """Check this machine, a cluster file or a plan against best practice, with remedies."""
    try:
        if model is not None and plan is None:
            raise ConfigError("--model is that of a plan; add --plan FILE, or leave it out")
        machine = None if cluster or plan else this_machine(port)
        findings = list(_of_files(cluster, plan, model))
        if machine is not None:
            findings += _of_machines(machine, [read_report(path) for path in beside or ()])
        elif beside:
            raise ConfigError("--with compares machines; leave out --cluster and --plan")
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json_text:
        print(as_json(findings, machine))
    else:
        _show(findings, everything=everything)
    bad: tuple[Status, ...] = ("fail", "warn") if strict else ("fail",)
    if worst(findings) in bad:
        raise typer.Exit(1)


def this_machine(port: int) -> Machine:
    """Its facts, with what torch and the compiled kernels say."""
    return read_machine(_software(), os.environ, cache=models_folder(), port=port)


def _of_machines(machine: Machine, others: Sequence[Machine]) -> Sequence[Finding]:
    """Checks of one machine; of others that were checked there, only what must be alike."""
    found = examine(f"machine {machine.name}", MACHINE_CHECKS, machine)
    if not others:
        return found
    named = ", ".join(each.name for each in (machine, *others))
    return (*found, *examine(f"machines {named}", VERSION_CHECKS, (machine, *others)))


def _of_files(cluster: Path | None, plan: Path | None, model: str | None) -> Sequence[Finding]:
    if cluster is None:
        if plan is None:
            return ()
        cluster = _probed()
    found = read_cluster(cluster)
    if plan is None:
        return examine(f"cluster {cluster}", CLUSTER_CHECKS, found)
    file = read_plan(plan)
    name = model or file.model
    if name is None:
        raise ConfigError(f"{plan} names no model; add `model:` there, or give --model")
    spec = spec_of(name)
    placed = place(file.resolve(spec), found, spec, "bfloat16", "bfloat16")
    return examine(f"plan {plan} on {cluster}", PLAN_CHECKS, placed)


def _probed() -> Path:
    """The cluster file of this machine, or of the cluster whose head it is, as probed last.

    Raises:
        ConfigError: it was not probed yet.
    """
    from shoal.cli.probe_sites import here_or_cluster, probe_cache

    cache = probe_cache()
    found = None if cache.is_empty else cache.path(here_or_cluster().key)
    if found is None:
        raise ConfigError(
            "a plan is checked on a cluster; run `shoal probe` first, or add --cluster FILE"
        )
    return found


def _software() -> Software:
    import_problem, torch_version, cuda = "", "", None
    try:
        import torch
    except (ImportError, OSError) as error:
        import_problem = str(error).partition("\n")[0]
    else:
        torch_version, built_for = str(torch.__version__), torch.version.cuda
        if built_for:
            major, _, minor = built_for.partition(".")
            cuda = (int(major), int(minor.partition(".")[0] or 0))
    kernels, problem = ("", "") if import_problem else _kernels()
    return Software(
        python=platform.python_version(),
        shoal=_version("shoal"),
        torch=torch_version,
        torch_cuda=cuda,
        torch_problem=import_problem,
        ray=_version("ray"),
        kernels=kernels,
        kernels_problem=problem,
        has_triton=find_spec("triton") is not None,
    )


def _kernels() -> tuple[str, str]:
    """What the compiled CPU kernels run with here, or why they don't."""
    from shoal.kernels.cpu import library

    try:
        best = library.load_library().shoal_cpu_best_isa()
    except OSError as error:
        return "", str(error)
    return (best.decode(), "") if best else ("", "this CPU has no AVX2")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _show(findings: Sequence[Finding], *, everything: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for status, line in lines(findings, everything=everything):
        text = Text(f"{status:<7} " if status else "", _COLOURS[status] if status else "")
        console.print(text.append(line, "" if status else "bold" if line[:1].isalpha() else ""))
