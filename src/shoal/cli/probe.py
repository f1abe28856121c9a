"""`shoal probe`: what devices, links and disks give, measured; a cluster file of it.

    here        every device of this machine; of every machine, where `shoal up` started a cluster
    --lab F     the hosts of a lab, through its throttles
    --from URL  the Steps that a server has run

Wires devices, launcher, survey and report together; measures nothing itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.options import Json
from shoal.cli.probe_sites import Place, here_or_cluster, lab_place, probe_cache
from shoal.cli.probe_steps import Steps
from shoal.cli.result_file import write_result
from shoal.cli.wrong_input import judges_input
from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.cluster_writer import Remarks, dump_cluster, warnings_in
from shoal.cluster.units import text
from shoal.core.cluster import Cluster, Constants, Device, Link
from shoal.core.errors import ConfigError

if TYPE_CHECKING:
    from shoal.probe.survey import Progress as Tell

_LEAST_S, _MOST_S = 0.2, 30.0


@judges_input
def probe(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="write the cluster here")
    ] = None,
    lab: Annotated[
        Path | None, typer.Option(metavar="FILE", help="measure a lab's hosts, as slow as they are")
    ] = None,
    namespaces: Annotated[
        bool | None,
        typer.Option(
            "--namespaces/--no-namespaces",
            help="of a lab: as `shoal lab up` has it",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="also run Steps of this shape, and fit the cost model's constants"),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="of those Steps: bfloat16,int8,int4")
    ] = "bfloat16,int8,int4",
    seconds: Annotated[
        float, typer.Option(min=_LEAST_S, max=_MOST_S, help="for each device, about")
    ] = 3.0,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="measure again, whatever is kept")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option("--from", metavar="URL", help="fit constants to what a server's Steps took"),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="of --from: the file that names the server's devices")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY")] = None,
    as_json: Json = False,
) -> None:
    """Measure what is there: devices, links, disks."""
    if server is not None:
        probed = _refitted(server, api_key, model, cluster)
    elif lab is not None:
        with lab_place(lab, namespaces) as place:
            probed = _measure(place, seconds, model, precision)
    else:
        place = here_or_cluster()
        kept = probe_cache().path(place.key)
        if kept is None or refresh or model is not None:
            probed = _measure(place, seconds, model, precision)
            _keep(place.key, probed.text)
        else:
            probed = _Probed(kept.read_text("utf-8"), read_cluster(kept))
            print("kept from before; --refresh measures again", file=sys.stderr)
    if output is not None:
        write_result(output, probed.text, "-o")
    if as_json:
        print(json.dumps(_as_json(probed), indent=2))
        return
    for line in _table(probed):
        print(line)
    if output is None:
        print("-o cluster.yaml writes this for `shoal plan MODEL --cluster cluster.yaml`")
    else:
        print(f"written to {output}; plan with: shoal plan MODEL --cluster {output}")


def _refitted(server: str, api_key: str | None, model: str | None, path: Path | None) -> _Probed:
    from shoal.cli.probe_from import refitted

    if model is None or path is None:
        raise ConfigError(
            "--from needs the model that the server runs and the cluster file of its devices; "
            "add --model and --cluster"
        )
    cluster = refitted(server, api_key, model, read_cluster(path))
    remarks = Remarks(head=(f"{path.name}, with constants of the Steps that {server} has run.",))
    return _Probed(dump_cluster(cluster, remarks), cluster)


@dataclass(frozen=True, slots=True)
class _Probed:
    """A cluster file, and the Cluster in it."""

    text: str
    cluster: Cluster

    @property
    def warnings(self) -> list[str]:
        return warnings_in(self.text)


def _measure(place: Place, seconds: float, model: str | None, precision: str) -> _Probed:
    from shoal.probe.checks import warnings_of
    from shoal.probe.found import cluster_of, remarks_of
    from shoal.probe.survey import survey

    steps = Steps(model, precision) if model is not None else None
    with _bar() as progress:
        found = survey(
            place.launcher(),
            place.sites,
            place.links,
            progress,
            device_s=seconds,
            calibrations=steps.questions() if steps is not None else (),
        )
    cluster = cluster_of(found)
    if steps is not None:
        cluster = replace(cluster, constants=steps.constants(cluster, found))
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return _Probed(dump_cluster(cluster, remarks_of(found, warnings_of(found), when)), cluster)


@contextmanager
def _bar() -> Iterator[Tell]:
    """Shows how far it is, where somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell


def _table(probed: _Probed) -> Iterator[str]:
    cluster = probed.cluster
    for host in cluster.hosts:
        yield f"{host.name}: disk {text(host.disk_bytes_per_s, 'B/s')}"
        for device in cluster.devices:
            if device.host == host.name:
                yield from _device_lines(device)
        if host.link is not None:
            yield f"  between its devices ({host.link.kind}): {_link_text(host.link)}"
    for each in cluster.links:
        yield f"{each.a} and {each.b}: {_link_text(each.link)}"
    if cluster.network is not None:
        yield f"other pairs of hosts: {_link_text(cluster.network)}"
    for table in cluster.all_reduce:
        size, seconds = table.points[0]
        shown = f"{text(size, 'B')} in {text(seconds, 's')}"
        yield f"sums of {', '.join(table.hosts)}: {shown}"
    for each_constants in cluster.constants:
        if each_constants.device:
            yield _constants_text(each_constants)
    for warning in probed.warnings:
        yield f"!  {warning}"


def _device_lines(device: Device) -> Iterator[str]:
    memory, rate = text(device.memory_bytes, "B"), text(device.bandwidth_bytes_per_s, "B/s")
    yield f"  {device.name}  {device.kind}, {memory} free, reads {rate}"
    products = ", ".join(f"{name} {text(each, 'op/s')}" for name, each in device.flops)
    yield f"    products: {products}"
    filled, launch = text(device.host_bytes_per_s, "B/s"), text(device.launch_s, "s")
    power = f", {device.watts:g} W at most" if device.watts is not None else ""
    yield f"    filled at {filled}, a kernel starts in {launch}{power}"


def _keep(key: str, content: str) -> None:
    """For the next time; what was measured is told all the same."""
    try:
        probe_cache().write(key, content)
    except OSError as error:
        print(f"not kept for the next time: {error}", file=sys.stderr)


def _link_text(link: Link) -> str:
    return f"{text(link.latency_s, 's')}, {text(link.bytes_per_s * 8, 'bit/s')}"


def _constants_text(found: Constants) -> str:
    return (
        f"steps of {found.device} in {found.precision}: {found.eta:.0%} of the memory's rate, "
        f"{found.mfu:.0%} of the products', off by {found.error:.0%} on average"
    )


def _as_json(probed: _Probed) -> dict[str, object]:
    cluster = probed.cluster
    return {
        "hosts": [asdict(each) for each in cluster.hosts],
        "devices": [{**asdict(each), "flops": dict(each.flops)} for each in cluster.devices],
        "network": asdict(cluster.network) if cluster.network is not None else None,
        "links": [asdict(each) for each in cluster.links],
        "sums": [asdict(each) for each in cluster.all_reduce],
        "warnings": probed.warnings,
        "cluster": probed.text,
    }
