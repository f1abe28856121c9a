"""`shoal lab`: a pretend mixed cluster on one machine, running the real code.

    shoal lab up lab.yaml        hosts, links, and a server over them, until it is ready
    shoal lab slow s1.i1.r0 0.3  its measured compute takes as long as at 0.3 of its speed
    shoal lab stop | kill s1     SIGSTOP, SIGKILL: a worker, an instance, a stage or a host
    shoal lab cut a b            nothing passes between them; `heal` undoes it
    shoal lab down               and nothing is left

Wires `lab/` and the commands together; knows nothing of how a worker runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.options import DEFAULT_MODEL, Json
from shoal.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from shoal.core.model_spec import ModelSpec
    from shoal.core.plan import ReplicaPlan
    from shoal.lab.file import LabFile
    from shoal.lab.folder import HostState, LabFolder, Record
    from shoal.lab.network import Network
    from shoal.plan_file import PlanFile

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="A pretend mixed cluster on one machine, running the real code.",
)

_READY_LIMIT_S = 300.0

Name = Annotated[str, typer.Option("--name", help="Of the lab, where there are several.")]
Who = Annotated[
    str, typer.Argument(metavar="WHO", help="A worker (s1.i1.r0), instance, stage or host.")
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, with hosts and links.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    namespaces: Annotated[
        bool | None,
        typer.Option(
            "--namespaces/--no-namespaces",
            help="Hosts as network namespaces (default: where root allows).",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Run this one, whatever the file says."),
    ] = None,
    name: Name = "lab",
) -> None:
    """Bring a lab up; further flags go to `shoal serve`."""
    from shoal.cli.terminal import find_model
    from shoal.lab.file import read_lab
    from shoal.model.spec import read_spec
    from shoal.plan_file import plan_table

    lab = read_lab(file, plan)
    if lab.plan is None:
        raise ConfigError(
            f"{file} has no plan; name one: --plan plan.yaml (`shoal probe --lab {file}` and "
            "`shoal plan` make one)"
        )
    folder = _named_folder(name)
    signal.signal(signal.SIGTERM, leave)
    with folder.locked():
        _refuse_second(folder)
        _take_down(folder)  # what a lab that crashed has left
        try:
            model = str(find_model(lab.plan.model or DEFAULT_MODEL, None, None).path.resolve())
            planned = _replicas(lab, lab.plan, read_spec(Path(model)))
            for line in plan_table(planned):
                print(line)
            url = _bring_up(folder, lab, planned, model, port, namespaces, ctx.args)
        except BaseException:
            _take_down(folder)
            folder.remove()
            raise
    print(f"ready      {url}/v1 (log: {folder.log}; end it with: shoal lab down)")


@app.command()
def down(name: Name = "lab") -> None:
    """End the lab and all that belongs to it."""
    folder = _named_folder(name)
    with folder.locked():
        was_up = _take_down(folder)
        folder.remove()
    print("the lab is down" if was_up else "no lab was up")


@app.command()
def slow(
    who: Who,
    speed: Annotated[float, typer.Argument(min=0.001, max=1.0, help="1: as fast as it can.")],
    name: Name = "lab",
) -> None:
    """Make workers slow: what they measure of themselves is stretched."""
    folder = _folder(name)
    with folder.locked():
        workers = _members(_record(folder), who)
        settings = folder.read_settings()
        speeds = {**settings.speeds, **dict.fromkeys(workers, speed)}
        folder.write_settings(replace(settings, speeds=speeds))
    print(f"{', '.join(workers)}: speed {speed:g}")


@app.command()
def stop(who: Who, name: Name = "lab") -> None:
    """Freeze workers (SIGSTOP)."""
    _signal(name, who, signal.SIGSTOP)


@app.command()
def resume(who: Who, name: Name = "lab") -> None:
    """Let frozen workers go on (SIGCONT)."""
    _signal(name, who, signal.SIGCONT)


@app.command()
def kill(who: Who, name: Name = "lab") -> None:
    """Kill workers (SIGKILL)."""
    _signal(name, who, signal.SIGKILL)


@app.command()
def cut(a: Who, b: Who, name: Name = "lab") -> None:
    """Let nothing pass between two workers or hosts."""
    folder = _folder(name)
    with folder.locked():
        record = _record(folder)
        _members(record, a), _members(record, b)
        if a == b:
            raise ConfigError(f"{a} cannot be cut from itself; name two")
        if (a, b) not in record.cuts and (b, a) not in record.cuts:
            record = replace(record, cuts=(*record.cuts, (a, b)))
        _apply_cuts(folder, record)
    print(f"{a} and {b} do not hear each other")


@app.command()
def heal(
    a: Annotated[str | None, typer.Argument(metavar="[A", help="As it was cut.")] = None,
    b: Annotated[str | None, typer.Argument(metavar="B]")] = None,
    name: Name = "lab",
) -> None:
    """Undo a cut; all of them, if none is named."""
    folder = _folder(name)
    with folder.locked():
        record = _record(folder)
        kept = tuple(each for each in record.cuts if a is not None and {*each} != {a, b})
        if a is not None and len(kept) == len(record.cuts):
            shown = ", ".join(f"{one} {other}" for one, other in record.cuts) or "none is"
            raise ConfigError(f"{a} and {b} are not cut; {shown}: name such a pair, or nothing")
        _apply_cuts(folder, replace(record, cuts=kept))
    print("healed")


@app.command()
def status(as_json: Json = False, name: Name = "lab") -> None:
    """Workers, their speeds and processes; what is cut."""
    folder = _folder(name)
    record = _record(folder)
    speeds, pids = folder.read_settings().speeds, folder.worker_pids()
    from shoal.lab.server import is_alive, process_state

    workers = [
        {
            "worker": worker,
            "host": host,
            "speed": speeds.get(worker, 1.0),
            "pid": pids.get(worker),
            "state": process_state(pids.get(worker)),
        }
        for worker, host in record.workers.items()
    ]
    is_up = is_alive(record.server_pid, record.server_started_s)
    if as_json:
        told = {"url": record.url, "server": is_up, "workers": workers, "cuts": record.cuts}
        print(json.dumps(told, indent=2))
        return
    print(f"{record.url}/v1" if is_up else f"the server is gone; its log: {folder.log}")
    for each in workers:
        where = f" on {each['host']}" if each["host"] else ""
        print(f"  {each['worker']}{where}  speed {each['speed']:g}  {each['pid']} {each['state']}")
    for one, other in record.cuts:
        print(f"  {one} and {other} do not hear each other")


def _bring_up(
    folder: LabFolder,
    lab: LabFile,
    replicas: Sequence[ReplicaPlan],
    model: str,
    port: int,
    namespaces: bool | None,
    flags: list[str],
) -> str:
    """Hosts, links, server; its address."""
    from shoal.core.plan import Plan
    from shoal.lab import links, server
    from shoal.lab.folder import Record
    from shoal.plan_file import dump_plan

    hosts, has_namespaces = make_hosts(network_of(folder.path), lab, namespaces)
    settings = links.first_settings(replicas, lab.links, hosts, has_namespaces=has_namespaces)
    folder.write_settings(settings)
    most = lab.plan.max_num_seqs if lab.plan is not None else None
    plan = Plan(replicas=tuple(replicas), max_num_seqs=most)
    folder.plan.write_text(dump_plan(plan), "utf-8")
    process = server.start(folder, model, port, flags)
    record = Record(
        server_pid=process.pid,
        server_started_s=server.started_s(process.pid),
        has_namespaces=has_namespaces,
        workers=links.workers_of(replicas),
        links={links.key(*each): speed.bandwidth_bytes_per_s for each, speed in lab.links.items()},
    )
    folder.write_record(record)
    url = server.wait_ready(process, folder.log, _READY_LIMIT_S)
    folder.write_record(replace(record, url=url))
    return url


def _replicas(lab: LabFile, plan: PlanFile, spec: ModelSpec) -> tuple[ReplicaPlan, ...]:
    """The plan on the lab's hosts, each CPU with its number of threads."""
    from shoal.plan_file.even import share_threads
    from shoal.plan_file.machine import num_cpus, num_cuda_devices

    found = plan.resolve(spec, num_cuda=num_cuda_devices()).replicas
    return share_threads([lab.with_hosts(each, num_cpus()) for each in found], num_cpus())


def make_hosts(
    network: Network, lab: LabFile, namespaces: bool | None
) -> tuple[dict[str, HostState], bool]:
    """The lab's hosts, and whether they are namespaces."""
    from shoal.lab.folder import HostState

    if not _wants_namespaces(network, lab, namespaces):
        return {host: HostState() for host in lab.hosts}, False
    network.create(lab.hosts, lab.links)
    return {
        host: HostState(network.command(host), network.address(lab.hosts, host))
        for host in lab.hosts
    }, True


def _wants_namespaces(network: Network, lab: LabFile, wanted: bool | None) -> bool:
    if not lab.hosts or wanted is False:
        return False
    why_not = network.why_not()
    if why_not is None:
        return True
    if wanted:
        raise ConfigError(f"--namespaces: {why_not}; use --no-namespaces")
    print(f"links      kept to by sockets, each pair of workers for itself ({why_not})")
    return False


def _take_down(folder: LabFolder) -> bool:
    """Remove all that a lab may have left, however far it came; whether there was anything."""
    from shoal.lab import server

    was_there = folder.settings.exists() or folder.has_record
    try:
        if (record := folder.read_record()) is not None:
            server.end(record.server_pid, record.server_started_s)
    except ConfigError as error:  # damaged files must not keep the rest from going
        print(f"{error}", file=sys.stderr)
    was_there |= server.end_strays(folder.plan) > 0
    try:
        server.end_workers(folder.worker_pids().values())
    except ConfigError as error:
        print(f"{error}", file=sys.stderr)
    removed = network_of(folder.path).remove()
    folder.clear()
    return was_there or bool(removed)


def _apply_cuts(folder: LabFolder, record: Record) -> None:
    """Hosts that are namespaces are cut on their wires, all else by sockets."""
    from shoal.lab import links
    from shoal.lab.file import LinkSpeed

    hosts = set(record.workers.values()) if record.has_namespaces else set()
    on_wires = {(a, b) for a, b in record.cuts if {a, b} <= hosts}
    if record.has_namespaces:
        network = network_of(folder.path)
        for one in hosts:
            for other in hosts:
                if one >= other:
                    continue
                if (one, other) in on_wires or (other, one) in on_wires:
                    network.cut(one, other)
                else:
                    bandwidth = record.links.get(links.key(one, other))
                    network.heal(one, other, LinkSpeed(bandwidth))
    by_sockets = tuple(each for each in record.cuts if each not in on_wires)
    folder.write_settings(links.with_cuts(folder.read_settings(), record.workers, by_sockets))
    folder.write_record(record)


def _signal(name: str, who: str, signum: signal.Signals) -> None:
    folder = _folder(name)
    with folder.locked():
        workers, pids = _members(_record(folder), who), folder.worker_pids()
        from shoal.lab.server import process_state

        for worker in workers:
            pid = pids.get(worker)
            if pid is None or process_state(pid) == "gone":
                raise ConfigError(f"{worker} has no process just now; see shoal lab status")
            os.kill(pid, signum)
    print(f"{', '.join(workers)}: {signum.name}")


def _refuse_second(folder: LabFolder) -> None:
    from shoal.lab.server import is_alive

    record = folder.read_record()
    if record is not None and is_alive(record.server_pid, record.server_started_s):
        raise ConfigError(
            f"a lab is up at {record.url or 'an address to come'}; end it with `shoal lab down`, "
            "or choose another --name"
        )


def _record(folder: LabFolder) -> Record:
    record = folder.read_record()
    if record is None:
        raise ConfigError("no lab is up; bring one up with `shoal lab up FILE`")
    return record


def _members(record: Record, who: str) -> list[str]:
    from shoal.lab.links import members

    found = members(record.workers, who)
    if not found:
        names = [*record.workers, *sorted({*record.workers.values()} - {""})]
        near = difflib.get_close_matches(who, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"there is no worker or host {who!r} in the lab; {hint}")
    return found


def _folder(name: str) -> LabFolder:
    """Of a lab that is there."""
    folder = _named_folder(name)
    if not folder.path.exists():
        raise ConfigError("no lab is up; bring one up with `shoal lab up FILE`")
    return folder


def _named_folder(name: str) -> LabFolder:
    from shoal.lab.folder import LabFolder
    from shoal.model.cache import models_folder

    if not name.isalnum() or len(name) > 20:
        raise ConfigError(f"--name is {name!r}; use up to 20 letters and digits")
    return LabFolder(models_folder().parent / "labs" / name)


def leave(signum: int, frame: FrameType | None) -> None:
    """SIGTERM as an exception, so that what is half there is taken down."""
    raise SystemExit(128 + signum)


def network_of(folder: Path) -> Network:
    """The namespaces of the lab that is written down there."""
    from shoal.lab.network import Network

    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return Network(f"shoal{digest[:6]}-")
