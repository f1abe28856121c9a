"""A cluster file: what a probe writes and people edit, from measured entries and catalogue names.

    hosts:
      - name: a
        devices: 8x H100-SXM nvlink             # from the catalogue, and what joins them
      - name: b
        devices:                                # several kinds, or measured ones
          - 2x RTX-4090
          - {kind: RTX-3090, memory: 22GiB, bandwidth: 850GB/s, flops: {bfloat16: 65T}}
        link: pcie4                             # or {latency: 10us, bandwidth: 22GB/s}
        all_reduce: {2: {16KiB: 12us, 1MiB: 60us}}          # ranks: size: time
        disk: 3GB/s
    network: {latency: 20us, bandwidth: 100Gbit/s}          # between hosts
    links: [{between: [a, b], latency: 50us, bandwidth: 10Gbit/s}]      # or devices: a.0
    sums: [{between: [a, b], points: {16KiB: 90us, 1MiB: 2ms}}]     # all-reduces among hosts
    request: 3ms                            # of HTTP, tokenizer and wires, beside Steps
    constants: [{kind: RTX-4090, engine: shoal, precision: int8, eta: 0.8, layer: 40us, mfu: 0.5}]
    layer_times: ...                        # measured, of one model's layers (`layer_times.py`)

One host needs no more than `devices: 2x RTX-4090 pcie4`. Devices are called a.0, a.1, and a.cpu.
`cluster24.ini` files of Helix are read as well. Knows nothing of how anything is measured.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import cast, get_args

from shoal.cluster import catalogue
from shoal.cluster.device_fields import DeviceDraft, draft_devices
from shoal.cluster.helix import read_helix
from shoal.cluster.layer_times import read_layer_times
from shoal.cluster.units import rate_bytes_per_s, size_bytes, text, time_s
from shoal.core.cluster import (
    AllReduceTable,
    Between,
    Cluster,
    Constants,
    Device,
    Host,
    Link,
    Points,
    Precision,
    check_points,
)
from shoal.core.errors import ConfigError
from shoal.plan_file.fields import Field, read_fields

MAX_HOSTS, MAX_DEVICES, MAX_LINKS, MAX_POINTS, MAX_CONSTANTS = 1024, 4096, 65536, 256, 4096
MAX_TABLES = 1024

_HOST_KEYS = ("name", "devices", "link", "all_reduce", "disk")
_CLUSTER_KEYS = ("hosts", "network", "links", "sums", "constants", "layer_times", "request")
_LINK_KEYS = ("latency", "bandwidth", "points", "kind")
_LINK_KINDS = (*catalogue.LINK_NAMES, "network", "measured")
_CONSTANT_KEYS = ("engine", "precision", "eta", "layer", "mfu")
_MORE_CONSTANTS = ("kind", "device", "error", "step", "row", "attention", "exposed", "source")
_ENGINES = ("shoal", "vllm", "trtllm", "sglang", "llama.cpp")
_LEAST_RATE, _MOST_RATE = 1e5, 1e13
_FITTED_ERROR = 0.1
_UNLIKELY = 100
"""Times as long, or a part as long, as a link by itself: a measurement is nearer than that."""


def read_cluster(path: Path) -> Cluster:
    """A cluster from a YAML file, or from an .ini file of Helix.

    Raises:
        ConfigError: with file and line, where a line is to blame.
    """
    if path.suffix == ".ini":
        return read_helix(path)
    root = read_fields(path)
    entries = root.entries((*_HOST_KEYS, *_CLUSTER_KEYS))
    hosts = _hosts(entries, root)
    num_devices = sum(draft.count for _, _, drafts, _ in hosts for draft in drafts)
    if num_devices > MAX_DEVICES:
        raise root.error(f"the cluster has {num_devices} devices; {MAX_DEVICES} at most")
    devices: list[Device] = []
    made: list[Host] = []
    for place, name, drafts, given in hosts:
        made.append(_host(place, name, drafts, given))
        devices += _named(drafts, name)
    host_names = [name for _, name, _, _ in hosts]
    _check_twice([place for place, *_ in hosts], host_names)
    network = _link(entries["network"], "network") if "network" in entries else None
    links = entries["links"].items(MAX_LINKS, least=0) if "links" in entries else []
    sums = entries["sums"].items(MAX_TABLES, least=0) if "sums" in entries else []
    fitted = entries["constants"].items(MAX_CONSTANTS) if "constants" in entries else []
    like = {("device", each.name): each for each in devices}
    like |= {("kind", each.kind): each for each in reversed(devices)}
    own_constants = _all_constants(fitted, like)
    layers = entries["layer_times"].items(MAX_CONSTANTS) if "layer_times" in entries else []
    kinds = {each.kind for each in devices}
    try:
        return Cluster(
            hosts=tuple(made),
            devices=tuple(devices),
            network=network,
            links=_links(links, {*host_names, *(each.name for each in devices)}),
            all_reduce=tuple(_sums(each, host_names) for each in sums),
            request_s=time_s(entries["request"], 1e-9, 10.0) if "request" in entries else 0.0,
            constants=(*own_constants, *catalogue.known_constants()),
            layer_times=tuple(read_layer_times(each, kinds) for each in layers),
        )
    except ConfigError as error:
        if str(error).startswith(f"{path}:"):
            raise
        raise ConfigError(f"{path}: {error}") from error


_HostDraft = tuple[Field, str, list[DeviceDraft], Mapping[str, Field]]


def _hosts(entries: Mapping[str, Field], root: Field) -> list[_HostDraft]:
    if "hosts" not in entries:
        if "devices" not in entries:
            raise root.error(
                "there are neither hosts nor devices; write devices: 2x RTX-4090 pcie4"
            )
        return [_host_draft(root, {"name": None, **entries})]
    for key in _HOST_KEYS:
        if key in entries:
            raise entries[key].error(f"{key} stands beside hosts; write it inside a host")
    return [
        _host_draft(each, each.entries(_HOST_KEYS)) for each in entries["hosts"].items(MAX_HOSTS)
    ]


def _host_draft(place: Field, entries: Mapping[str, Field | None]) -> _HostDraft:
    given = {name: each for name, each in entries.items() if each is not None}
    if "name" not in entries:
        raise place.error("there is no key name; give the host one: name: a")
    if "devices" not in given:
        raise place.error("there is no key devices; name some: devices: 2x RTX-4090 pcie4")
    name = given["name"].text() if "name" in given else "local"
    return place, name, draft_devices(given["devices"]), given


def _named(drafts: Sequence[DeviceDraft], host: str) -> list[Device]:
    """Numbered in the order in which they are written."""
    devices: list[Device] = []
    num_gpus = 0
    for draft in drafts:
        for _ in range(draft.count):
            if draft.is_cpu:
                number, place = "cpu", "cpu"
            else:
                number, place = str(num_gpus), f"cuda:{num_gpus}"
                num_gpus += 1
            name = f"{host}.{number}" if draft.name is None or draft.count > 1 else draft.name
            devices.append(draft.device(name, host, place))
    return devices


def _host(
    place: Field, name: str, drafts: Sequence[DeviceDraft], given: Mapping[str, Field]
) -> Host:
    link = _host_link(place, name, drafts, given)
    tables = tuple(_tables(given["all_reduce"])) if "all_reduce" in given else ()
    if link is not None:
        _check_units(given.get("all_reduce", place), tables, link)
    kinds = {draft.kind for draft in drafts}
    if not tables and link is not None and len(kinds) == 1 and not link.points:
        tables = catalogue.all_reduce_tables(kinds.pop(), link.kind)
    host = Host(name=name, link=link, all_reduce=tables)
    if "disk" not in given:
        return host
    disk = rate_bytes_per_s(given["disk"], 1e6, 1e12)
    return Host(name=name, link=link, all_reduce=tables, disk_bytes_per_s=disk)


def _host_link(
    place: Field, name: str, drafts: Sequence[DeviceDraft], given: Mapping[str, Field]
) -> Link | None:
    """As it is named for the host, or beside the one group of devices that there is."""
    said = [draft for draft in drafts if draft.link is not None]
    if "link" in given:
        if said:
            raise given["link"].error(
                f"link stands beside {said[0].link} at the devices; remove one of the two"
            )
        return _named_link(given["link"], drafts)
    if len(drafts) == 1 and drafts[0].link is not None:
        assert drafts[0].known is not None, "only a catalogue's device says its link"
        return drafts[0].known.link(drafts[0].link)
    if sum(draft.count for draft in drafts) == 1:
        return None
    if len(said) == len(drafts) and len({draft.link for draft in said}) == 1:
        links = [each.known.link(cast(str, each.link)) for each in said if each.known]
        return min(links, key=_rate)
    raise place.error(
        f"nothing says what joins the devices of host {name}; say it: link: pcie4, or "
        "link: {latency: 10us, bandwidth: 22GB/s}"
    )


def _named_link(field: Field, drafts: Sequence[DeviceDraft]) -> Link:
    if field.is_mapping:
        return _link(field, "measured")
    name = field.choice(catalogue.LINK_NAMES)
    known = [draft.known for draft in drafts if draft.known is not None]
    if not known:
        raise field.error(
            f"link is {name!r}, but no device of the host is in the catalogue; give its latency "
            "and bandwidth: {latency: 10us, bandwidth: 22GB/s}"
        )
    try:
        return min((each.link(name) for each in known), key=_rate)
    except ConfigError as error:
        raise field.error(str(error)) from error


def _link(field: Field, kind: str) -> Link:
    return _link_of(field, field.entries(_LINK_KEYS), kind)


def _check_twice(places: Sequence[Field], names: Sequence[str]) -> None:
    lines: dict[str, int] = {}
    for place, name in zip(places, names, strict=True):
        if name in lines:
            raise place.error(
                f"two hosts are named {name!r}, the other one in line {lines[name]}; give each its "
                "own name"
            )
        lines[name] = place.line


def _links(fields: Sequence[Field], names: Set[str]) -> tuple[Between, ...]:
    found: dict[frozenset[str], Between] = {}
    for field in fields:
        each = _between(field, names)
        ends = frozenset((each.a, each.b))
        if ends in found:
            raise field.error(
                f"two links join {' and '.join(sorted(ends))}; leave the one that holds"
            )
        found[ends] = each
    return tuple(found.values())


def _end(field: Field, names: Collection[str]) -> str:
    name = field.text()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names)[:8])}"
        raise field.error(f"{name!r} is neither a host nor a device; {hint}")
    return name


def _between(field: Field, names: Set[str]) -> Between:
    entries = field.entries(("between", *_LINK_KEYS))
    if "between" not in entries:
        raise field.error("there is no key between; name two hosts or devices: between: [a, b]")
    ends = entries["between"].items(2)
    if len(ends) != 2:
        raise entries["between"].error("between names one end; name two: [a, b]")
    a, b = (_end(each, names) for each in ends)
    if a == b:
        raise entries["between"].error(
            f"a link joins {a!r} to itself; name two hosts or two devices, or say link: of the host"
        )
    return Between(a, b, _link_of(field, entries, "measured"))


def _link_of(field: Field, entries: Mapping[str, Field], kind: str) -> Link:
    for key in ("latency", "bandwidth"):
        if key not in entries:
            raise field.error(
                f"{field.name} has no {key}; say both: {{latency: 20us, bandwidth: 100Gbit/s}}"
            )
    latency = time_s(entries["latency"], 1e-8, 10.0)
    rate = rate_bytes_per_s(entries["bandwidth"], _LEAST_RATE, _MOST_RATE)
    points = _points(entries["points"]) if "points" in entries else ()
    if "kind" in entries:
        kind = entries["kind"].choice(_LINK_KINDS)
    link = Link(latency_s=latency, bytes_per_s=rate, kind=kind, points=points)
    if points and not 0.2 < points[-1][0] / rate / points[-1][1] < 5:
        raise entries["points"].error(
            f"{text(points[-1][0], 'B')} in {text(points[-1][1], 's')} is no "
            f"{text(rate, 'B/s')}, which bandwidth says; check both units"
        )
    return link


def _points(field: Field) -> Points:
    pairs = field.pairs()
    if not 1 <= len(pairs) <= MAX_POINTS:
        raise field.error(f"{field.name} has {len(pairs)} points; give 1 to {MAX_POINTS}")
    points = tuple(sorted((size_bytes(size), time_s(time)) for size, time in pairs))
    try:
        check_points(field.name, points)
    except ConfigError as error:
        raise field.error(str(error)) from error
    return points


def _tables(field: Field) -> list[AllReduceTable]:
    found = []
    for name, each in field.entries().items():
        ranks, _, custom = name.partition(" ")
        is_count = re.fullmatch("[0-9]{1,5}", ranks) and 2 <= int(ranks) <= MAX_DEVICES
        if custom not in ("", "custom") or not is_count:
            raise each.error(f"all_reduce has {name!r} ranks; it must be a whole number from 2 on")
        found.append(
            AllReduceTable(
                num_ranks=int(ranks), points=_points(each), backend="custom" if custom else "nccl"
            )
        )
    return found


def _check_units(field: Field, tables: Sequence[AllReduceTable], link: Link) -> None:
    """A ring over the link takes about as long; a time in a wrong unit is off by 1,000."""
    for table in tables:
        for size, time in table.points:
            expected = 2 * (table.num_ranks - 1) * link.latency_s + size / link.bytes_per_s
            if not 1 / _UNLIKELY < time / expected < _UNLIKELY:
                raise field.error(
                    f"{size} B among {table.num_ranks} ranks take {time:g} s, where their link "
                    f"would take about {expected:.2g} s; check the units of both"
                )


def _sums(field: Field, names: Sequence[str]) -> AllReduceTable:
    entries = field.entries(("between", "points"))
    for key in ("between", "points"):
        if key not in entries:
            raise field.error(
                f"sums have no {key}; say both: {{between: [a, b], points: {{16KiB: 90us}}}}"
            )
    hosts = tuple(_end(each, names) for each in entries["between"].items(MAX_HOSTS))
    if len(set(hosts)) != len(hosts) or len(hosts) < 2:
        raise entries["between"].error("sums need two hosts or more, each once: between: [a, b]")
    return AllReduceTable(num_ranks=len(hosts), points=_points(entries["points"]), hosts=hosts)


def _all_constants(
    fields: Sequence[Field], devices: Mapping[tuple[str, str], Device]
) -> tuple[Constants, ...]:
    found: dict[tuple[str, ...], Constants] = {}
    for field in fields:
        each = _constants(field, devices)
        key = each.device or each.kind, each.engine, each.precision
        if key in found:
            raise field.error(f"constants of {', '.join(key)} stand there twice; remove one")
        found[key] = each
    return tuple(found.values())


def _constants(field: Field, devices: Mapping[tuple[str, str], Device]) -> Constants:
    entries = field.entries((*_CONSTANT_KEYS, *_MORE_CONSTANTS))
    for key in _CONSTANT_KEYS:
        if key not in entries:
            raise field.error(
                f"constants have no {key}; they need kind or device, {', '.join(_CONSTANT_KEYS)}"
            )
    like = _fitted_on(field, entries, devices)
    return Constants(
        kind=like.kind,
        engine=entries["engine"].choice(_ENGINES),
        precision=cast(Precision, entries["precision"].choice(get_args(Precision))),
        eta=entries["eta"].number(0.005, 5.0),
        layer_s=time_s(entries["layer"], 0.0, 0.1),
        mfu=entries["mfu"].number(0.005, 5.0),
        error=entries["error"].number(0.0, 10.0) if "error" in entries else _FITTED_ERROR,
        bandwidth_bytes_per_s=like.bandwidth_bytes_per_s,
        flops_per_s=like.flops_per_s("bfloat16"),
        source=entries["source"].text() if "source" in entries else f"{field.file}:{field.line}",
        device=like.name if "device" in entries else "",
        step_s=time_s(entries["step"], 0.0, 1.0) if "step" in entries else 0.0,
        row_s=time_s(entries["row"], 0.0, 0.1) if "row" in entries else 0.0,
        attention=entries["attention"].number(5e-5, 5.0) if "attention" in entries else None,
        exposed=entries["exposed"].number(0.0, 1.0) if "exposed" in entries else 0.0,
    )


def _fitted_on(
    field: Field, entries: Mapping[str, Field], devices: Mapping[tuple[str, str], Device]
) -> Device:
    """The device that constants name, or one of the kind they do."""
    key = "device" if "device" in entries else "kind"
    if key not in entries:
        raise field.error("constants name no kind and no device; say what they were fitted on")
    name = entries[key].text()
    if (key, name) in devices:
        return devices[key, name]
    what = "" if key == "device" else "of kind "
    raise entries[key].error(f"the cluster has no device {what}{name!r}; remove them")


def _rate(link: Link) -> float:
    return link.bytes_per_s
