"""Cluster files that are written are read back as the same cluster."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from test_cluster_file import FULL

from shoal.cluster import catalogue
from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.cluster_writer import Remarks, dump_cluster, warnings_in
from shoal.cluster.probe_cache import ProbeCache, key_of
from shoal.core.cluster import (
    AllReduceTable,
    Between,
    Cluster,
    Constants,
    Device,
    Host,
    LayerTimes,
    Link,
)

ODD = Cluster(
    hosts=(
        Host(
            name="node-1",
            link=Link(latency_s=1.5e-6, bytes_per_s=2.2e10, kind="pcie4"),
            all_reduce=(
                AllReduceTable(num_ranks=2, points=((1 << 14, 1.2e-5), (1 << 20, 6e-5))),
                AllReduceTable(num_ranks=2, points=((1 << 14, 8e-6),), backend="custom"),
            ),
            disk_bytes_per_s=3.1e9,
        ),
        Host(name="2", disk_bytes_per_s=8.5e8),
        Host(name="true", disk_bytes_per_s=8.5e8),
    ),
    devices=(
        Device(
            name="old one",
            kind="GTX-1080",
            host="node-1",
            device="cuda:0",
            memory_bytes=(8 << 30) + 12345,
            bandwidth_bytes_per_s=3.2e11,
            flops=(("float32", 8.9e12), ("float16", 1.4e11)),
            precisions=("float32", "int8"),
            launch_s=7.77e-6,
            host_bytes_per_s=1.1e10,
            usd_per_hour=0.05,
            watts=180.5,
            speed=0.75,
        ),
        replace(catalogue.kind("RTX-4090").device("node-1.1", "node-1", "cuda:1")),
        Device(
            name="2.cpu",
            kind="cpu",
            host="2",
            device="cpu",
            memory_bytes=5 << 30,
            bandwidth_bytes_per_s=1.0303e10,
            flops=(("float32", 5.1234e10),),
            precisions=("float32",),
            launch_s=9.9e-7,
            host_bytes_per_s=6e9,
        ),
        Device(
            name="true.cpu",
            kind="cpu",
            host="true",
            device="cpu",
            memory_bytes=5 << 30,
            bandwidth_bytes_per_s=9.87e9,
            flops=(("float32", 5.1234e10),),
            precisions=("float32", "int4"),
            host_bytes_per_s=6e9,
        ),
    ),
    network=Link(latency_s=2.5e-4, bytes_per_s=1.25e8),
    links=(
        Between(
            "node-1",
            "2",
            Link(
                latency_s=1e-3,
                bytes_per_s=2.5e6,
                points=((1 << 10, 1e-3), (1 << 20, 0.42)),
                kind="network",
            ),
        ),
    ),
    all_reduce=(
        AllReduceTable(num_ranks=2, points=((4096, 2e-3), (100_000, 0.05)), hosts=("node-1", "2")),
    ),
    layer_times=(
        LayerTimes(
            kind="RTX-4090",
            hidden_size=4096,
            ffn_size=14336,
            num_heads=32,
            num_kv_heads=8,
            precision="float16",
            decode=((1, 4e-4), (16, 5e-4)),
            prompt=((1, 1e-5), (512, 3e-3)),
            error=0.2,
        ),
    ),
    request_s=3.25e-3,
    constants=(
        Constants(
            kind="cpu",
            device="2.cpu",
            engine="shoal",
            precision="float32",
            eta=0.8123,
            layer_s=4.024e-13,  # what a fit leaves of nothing
            mfu=0.51,
            error=0.043,
            bandwidth_bytes_per_s=1.0303e10,
            flops_per_s=5.1234e10,
            source="shoal probe --model x: 2",
            step_s=3e-4,
            row_s=3.1e-12,
            attention=0.25,
            exposed=0.9178,
        ),
        *catalogue.known_constants(),
    ),
)


def _again(cluster: Cluster, tmp_path: Path) -> Cluster:
    path = tmp_path / "written.yaml"
    path.write_text(dump_cluster(cluster), encoding="utf-8")
    return read_cluster(path)


def _close(one: Any, other: Any) -> bool:
    """To the four digits that are written."""
    if isinstance(one, float) or isinstance(other, float):
        return bool(one == pytest.approx(other, rel=6e-4))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return bool(one == pytest.approx(other, rel=1e-4))
    return bool(one == other)


@pytest.fixture(params=["file", "odd"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Cluster:
    if request.param == "odd":
        return ODD
    path = tmp_path / "full.yaml"
    path.write_text(FULL, encoding="utf-8")
    return read_cluster(path)


def test_what_is_written_is_read_back(cluster: Cluster, tmp_path: Path) -> None:
    said, read = _plain(cluster), _plain(_again(cluster, tmp_path))
    for name, value in said.items():
        assert _close(value, read[name]), name


def _plain(cluster: Cluster) -> dict[str, Any]:
    """Without where constants stood: that is another file."""
    found = asdict(replace(cluster, constants=tuple(map(_without_file, cluster.constants))))
    return {each.name: found[each.name] for each in fields(Cluster) if each.init}


def _without_file(fitted: Constants) -> Constants:
    return replace(fitted, source="") if ".yaml:" in fitted.source else fitted


def test_written_again_it_is_the_same_text(cluster: Cluster, tmp_path: Path) -> None:
    again = _again(cluster, tmp_path)
    assert dump_cluster(_again(again, tmp_path)) == dump_cluster(again)


def test_odd_says_everything_there_is_to_say() -> None:
    """So that a new field cannot be forgotten by the writer."""
    for kind, values in (
        (Cluster, [ODD]),
        (LayerTimes, ODD.layer_times),
        (Device, ODD.devices),
        (Link, [ODD.hosts[0].link, *(each.link for each in ODD.links)]),
        (Constants, ODD.constants[:1]),
        (Host, ODD.hosts),
        (AllReduceTable, (*ODD.hosts[0].all_reduce, *ODD.all_reduce)),
    ):
        for each in (each for each in fields(kind) if each.init):
            usual = each.default
            assert any(getattr(value, each.name) != usual for value in values), each.name


def test_remarks_are_comments_and_warnings_are_found_again(tmp_path: Path) -> None:
    remarks = Remarks(("made today",), ("a link\nis slow",), {"2.cpu": ["an old one"]})
    text = dump_cluster(ODD, remarks)
    assert text.startswith("# made today\n# ! a link is slow\nhosts:\n")
    assert "      # an old one\n      - {kind: cpu" in text
    assert warnings_in(text) == ["a link is slow"]
    (tmp_path / "c.yaml").write_text(text)
    assert len(read_cluster(tmp_path / "c.yaml").devices) == 4


def test_what_was_probed_is_kept_under_the_hardware(tmp_path: Path) -> None:
    cache = ProbeCache(tmp_path / "probes")
    key = key_of([("a", 2), ("b", 4)])
    assert key == key_of([("b", 4), ("a", 2)]) != key_of([("a", 2), ("b", 5)])
    assert (cache.is_empty, cache.path(key)) == (True, None)
    cache.write(key, "devices: 2x RTX-4090 pcie4\n")
    found = cache.path(key)
    assert found is not None
    assert len(read_cluster(found).devices) == 2
    assert cache.path(key_of([])) is None
