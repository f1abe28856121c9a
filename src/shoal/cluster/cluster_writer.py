"""A Cluster as a cluster file: what `read_cluster` reads back, laid out for people to edit.

Numbers have four digits, more than any measurement has. Remarks stand as comments before what they
are about. Knows nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.cluster import catalogue
from shoal.core.cluster import (
    AllReduceTable,
    Between,
    Cluster,
    Constants,
    Device,
    Host,
    LayerTimes,
    Link,
    Points,
)

_WIDTH = 96
_WARNING = "! "
_NOT_TEXT = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
_SIZES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_CPU_LAUNCH_S, _GPU_LAUNCH_S = 2e-6, 5e-6


@dataclass(frozen=True, slots=True)
class Remarks:
    """For people: about the file, and about a host, a device, a pair ("a|b") or "network"."""

    head: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    about: Mapping[str, Sequence[str]] = field(default_factory=dict)


def dump_cluster(cluster: Cluster, remarks: Remarks | None = None) -> str:
    """YAML that `read_cluster` makes the same Cluster of, to four digits."""
    remarks = remarks or Remarks()
    lines = [*_comments(remarks.head, ""), *_comments(remarks.warnings, "", _WARNING), "hosts:"]
    for host in cluster.hosts:
        devices = [each for each in cluster.devices if each.host == host.name]
        lines += _host(host, devices, remarks)
    if cluster.network is not None:
        lines += _comments(remarks.about.get("network", ()), "")
        lines += _flow("network: ", _link(cluster.network, "network"))
    if cluster.request_s:
        lines.append(f"request: {time_text(cluster.request_s)}")
    if cluster.all_reduce:
        lines.append("sums:")
        for table in cluster.all_reduce:
            lines += _flow("  - ", _sums(table))
    if cluster.links:
        lines.append("links:")
        for each in cluster.links:
            lines += _comments(remarks.about.get(f"{each.a}|{each.b}", ()), "  ")
            lines += _flow("  - ", _between(each))
    own = [each for each in cluster.constants if each not in catalogue.known_constants()]
    if own:
        lines.append("constants:")
        for fitted in own:
            lines += _flow("  - ", _constants(fitted))
    if cluster.layer_times:
        lines.append("layer_times:")
        for measured in cluster.layer_times:
            lines += _flow("  - ", _layer_times(measured))
    return "\n".join(lines) + "\n"


def warnings_in(text: str) -> list[str]:
    """Those that `dump_cluster` wrote."""
    lead = f"# {_WARNING}"
    return [line.removeprefix(lead) for line in text.splitlines() if line.startswith(lead)]


def _host(host: Host, devices: Sequence[Device], remarks: Remarks) -> Iterator[str]:
    yield from _comments(remarks.about.get(host.name, ()), "  ")
    yield f"  - name: {_quoted(host.name)}"
    yield "    devices:"
    num_gpus = 0
    for device in devices:
        number = "cpu" if device.kind == "cpu" else str(num_gpus)
        num_gpus += device.kind != "cpu"
        yield from _comments(remarks.about.get(device.name, ()), "      ")
        yield from _flow("      - ", _device(device, f"{host.name}.{number}"))
    if host.link is not None:
        yield from _flow("    link: ", _link(host.link, "measured"))
    if host.all_reduce:
        yield "    all_reduce:"
        yield from _tables(host.all_reduce, "      ")
    yield f"    disk: {rate_text(host.disk_bytes_per_s)}"


def _device(device: Device, usual_name: str) -> Iterator[tuple[str, str]]:
    known = catalogue.kinds().get(device.kind)
    base = known.device("", "", "") if known is not None else None
    yield "kind", _quoted(device.kind)
    if device.name != usual_name:
        yield "name", _quoted(device.name)
    if base is None or device.memory_bytes != base.memory_bytes:
        yield "memory", size_text(device.memory_bytes)
    is_measured = device.source == "measured"
    if is_measured:
        yield "bandwidth", rate_text(device.bandwidth_bytes_per_s)
        yield "flops", _braces((name, flops_text(rate)) for name, rate in device.flops)
    if base is None or device.precisions != base.precisions:
        yield "precisions", f"[{', '.join(device.precisions)}]"
    usual_launch_s = _CPU_LAUNCH_S if device.kind == "cpu" else _GPU_LAUNCH_S
    if is_measured or device.launch_s != usual_launch_s:
        yield "launch", time_text(device.launch_s)
    if base is None or device.host_bytes_per_s != base.host_bytes_per_s:
        yield "host_bandwidth", rate_text(device.host_bytes_per_s)
    for name in ("usd_per_hour", "watts"):
        value = getattr(device, name)
        if value is not None and (base is None or value != getattr(base, name)):
            yield name, number_text(value)
    if device.speed != 1.0:
        yield "speed", number_text(device.speed)


def _between(each: Between) -> Iterator[tuple[str, str]]:
    yield "between", f"[{_quoted(each.a)}, {_quoted(each.b)}]"
    yield from _link(each.link, "measured")


def _link(link: Link, usual_kind: str) -> Iterator[tuple[str, str]]:
    yield "latency", time_text(max(link.latency_s, 1e-8))
    yield "bandwidth", rate_text(link.bytes_per_s)
    if link.kind != usual_kind:
        yield "kind", link.kind
    if link.points:
        yield "points", _points(link.points)


def _tables(tables: Sequence[AllReduceTable], indent: str) -> Iterator[str]:
    for each in tables:
        ranks = f"{each.num_ranks}" + (f" {each.backend}" if each.backend != "nccl" else "")
        yield from _wrapped(f"{indent}{ranks}: ", [_points(each.points)])


def _sums(table: AllReduceTable) -> Iterator[tuple[str, str]]:
    yield "between", f"[{', '.join(map(_quoted, table.hosts))}]"
    yield "points", _points(table.points)


def _constants(fitted: Constants) -> Iterator[tuple[str, str]]:
    yield "kind", _quoted(fitted.kind)
    if fitted.device:
        yield "device", _quoted(fitted.device)
    yield "engine", fitted.engine
    yield "precision", fitted.precision
    yield "eta", number_text(fitted.eta)
    yield "layer", time_text(fitted.layer_s)
    yield "mfu", number_text(fitted.mfu)
    if fitted.step_s:
        yield "step", time_text(fitted.step_s)
    if fitted.row_s:
        yield "row", time_text(fitted.row_s)
    if fitted.attention is not None:
        yield "attention", number_text(fitted.attention)
    if fitted.exposed:
        yield "exposed", number_text(fitted.exposed)
    yield "error", number_text(fitted.error)
    if fitted.source:
        yield "source", _quoted(fitted.source)


def _layer_times(measured: LayerTimes) -> Iterator[tuple[str, str]]:
    yield "kind", _quoted(measured.kind)
    yield "hidden", str(measured.hidden_size)
    yield "ffn", str(measured.ffn_size)
    yield "heads", str(measured.num_heads)
    yield "kv_heads", str(measured.num_kv_heads)
    yield "precision", measured.precision
    for name, points in (("decode", measured.decode), ("prompt", measured.prompt)):
        yield name, _braces((str(count), time_text(seconds)) for count, seconds in points)
    yield "error", number_text(measured.error)


def size_text(size_bytes: int) -> str:
    """Such as 79.2GiB: whole if it is, else to a ten-thousandth."""
    for unit, factor in _SIZES:
        if size_bytes >= factor:
            whole, rest = divmod(size_bytes, factor)
            return f"{whole}{unit}" if not rest else f"{size_bytes / factor:.4f}{unit}"
    return f"{size_bytes}B"


def rate_text(bytes_per_s: float) -> str:
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bytes_per_s >= factor:
            return f"{number_text(bytes_per_s / factor)}{prefix}B/s"
    return f"{number_text(bytes_per_s)}B/s"


def flops_text(rate: float) -> str:
    if rate >= 1e12:
        return f"{number_text(rate / 1e12)}T"
    return f"{number_text(rate / 1e9)}G"


def time_text(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{number_text(seconds / factor)}{unit}"
    return f"{number_text(seconds / 1e-9)}ns"


def number_text(value: float) -> str:
    """Four digits, and never an exponent: 0.5, 12.35, 3350."""
    digits = f"{value:.4g}"
    if "e" not in digits:
        return digits
    return f"{float(digits):.12f}".rstrip("0").rstrip(".")


def _points(points: Points) -> str:
    return _braces((_exact_size(size), time_text(seconds)) for size, seconds in points)


def _exact_size(size_bytes: int) -> str:
    for unit, factor in _SIZES:
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def _braces(pairs: Iterator[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs) + "}"


def _flow(lead: str, pairs: Iterator[tuple[str, str]]) -> list[str]:
    """A mapping in braces, over as many lines as it takes."""
    words = [f"{name}: {value}" for name, value in pairs]
    words[0] = "{" + words[0]
    words[-1] += "}"
    return _wrapped(lead, words)


def _wrapped(lead: str, words: Sequence[str]) -> list[str]:
    lines, current = [], lead
    for place, word in enumerate(words):
        piece = word + (", " if place + 1 < len(words) else "")
        if len(current) + len(piece.rstrip()) > _WIDTH and current.strip() != lead.strip():
            lines.append(current.rstrip())
            current = " " * (len(lead) + 1)
        current += piece
    return [*lines, current.rstrip()]


def _comments(words: Sequence[str], indent: str, mark: str = "") -> list[str]:
    return [f"{indent}# {mark}{' '.join(each.split())}" for each in words]


def _quoted(name: str) -> str:
    """As YAML needs it."""
    plain = name.replace("-", "").replace(".", "").replace("_", "").isalnum() and name.isascii()
    is_word = plain and any(each.isalpha() for each in name) and not name.startswith(("-", "."))
    if is_word and name.lower() not in _NOT_TEXT:
        return name
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
