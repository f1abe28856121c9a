"""Cluster files: what they say, what is refused and where; the catalogue; Helix's format."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from shoal.cluster import catalogue
from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.device_fields import DeviceDraft
from shoal.core.cluster import Between, Cluster, Device, Host, Link
from shoal.core.errors import ConfigError

FULL = """\
hosts:
  - name: a
    devices: 8x H100-SXM nvlink
  - name: b
    devices:
      - 2x RTX-4090
      - {kind: RTX-3090, memory: 22GiB, bandwidth: 850GB/s, flops: {bfloat16: 65T}, speed: 0.5}
    link: pcie4
    all_reduce: {2: {16KiB: 12us, 1MiB: 60us}}
    disk: 3GB/s
  - name: c
    devices: [{kind: cpu, memory: 48GiB, bandwidth: 60GB/s, flops: {float32: 2T, bfloat16: 4T}}]
network: {latency: 20us, bandwidth: 100Gbit/s}
links:
  - {between: [a, b], latency: 50us, bandwidth: 10Gbit/s, points: {1KiB: 55us, 100MB: 81ms}}
  - {between: [b.0, b.1], latency: 5us, bandwidth: 28GB/s}
constants:
  - {kind: RTX-4090, engine: shoal, precision: int8, eta: 0.8, layer: 40us, mfu: 0.5}
"""


def _read(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return read_cluster(path)


def _refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, text)
    return str(caught.value).removeprefix(f"{tmp_path}/")


def test_everything_a_file_may_say(tmp_path: Path) -> None:
    cluster = _read(tmp_path, FULL)
    assert len(cluster.devices) == 12
    assert [each.name for each in cluster.devices[8:]] == ["b.0", "b.1", "b.2", "c.cpu"]
    old = cluster.device("b.2")
    assert (old.memory_bytes, old.device, old.host) == (22 << 30, "cuda:2", "b")
    assert (old.bandwidth_bytes_per_s, old.speed, old.source) == (850e9, 0.5, "measured")
    assert old.usd_per_hour == catalogue.kind("RTX-3090").usd_per_hour
    assert cluster.device("a.0").source == "catalogue"
    cpu = cluster.at("c", "cpu")
    assert cpu.flops_per_s("bfloat16") == 4e12
    assert cluster.host("b").disk_bytes_per_s == 3e9
    assert [table.num_ranks for table in cluster.host("b").all_reduce] == [2]
    assert {table.num_ranks for table in cluster.host("a").all_reduce} == {2, 4, 8}
    assert cluster.constants[0].layer_s == pytest.approx(40e-6)


def test_links_by_pair(tmp_path: Path) -> None:
    cluster = _read(tmp_path, FULL)
    assert cluster.link("a.0", "a.0").bytes_per_s == math.inf
    assert cluster.link("a.0", "a.7").kind == "nvlink"
    assert cluster.link("a.3", "b.1").bytes_per_s == 10e9 / 8
    assert cluster.link("b.1", "a.3").points[0] == (1024, pytest.approx(55e-6))
    assert cluster.link("b.0", "b.1").bytes_per_s == 28e9
    assert cluster.link("b.0", "b.2").kind == "pcie4"
    assert cluster.link("c.cpu", "b.0").bytes_per_s == 100e9 / 8


def test_one_line_is_a_cluster(tmp_path: Path) -> None:
    cluster = _read(tmp_path, "devices: 2x RTX-4090 pcie4\n")
    assert [each.device for each in cluster.devices] == ["cuda:0", "cuda:1"]
    assert cluster.at(None, "cuda").name == "local.0"


def test_fewer_and_slower(tmp_path: Path) -> None:
    cluster = _read(tmp_path, FULL)
    fewer = cluster.without(["b.0", "c.cpu"])
    assert len(fewer.devices) == 10
    assert [host.name for host in fewer.hosts] == ["a", "b"]
    assert fewer.slowed("a.1", 0.5).device("a.1").speed == 0.5
    with pytest.raises(ConfigError, match=r"there is no device 'a\.99'"):
        cluster.without(["a.99"])
    with pytest.raises(ConfigError, match="no devices"):
        cluster.without([each.name for each in cluster.devices])


MEASURED = "{kind: new, memory: 24GB, bandwidth: 1000GB/s, flops: {bfloat16: 165T}}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "devices: 2x H100-SMX nvlink",
            ":1: no device is known as 'H100-SMX'; did you mean H100-SXM",
        ),
        ("devices: 2x RTX-4090 nvlink", ":1: RTX-4090 has no nvlink; write pcie4"),
        ("devices: 2x RTX-4090 nvlnk", "no link is known as 'nvlnk'"),
        ("devices: two RTX-4090", "is no group of devices"),
        ("devices: 0x RTX-4090 pcie4", "is no group of devices"),
        ("devices: 9999x RTX-4090 pcie4", "more than 1024 devices"),
        ("devices: 2x RTX-4090", "nothing says what joins the devices of host local"),
        ("hosts: [{devices: L4}]", ":1: there is no key name"),
        ("hosts: [{name: a}]", ":1: there is no key devices"),
        ("network: {latency: 1us, bandwidth: 1GB/s}", ":1: there are neither hosts nor devices"),
        (
            "hosts:\n- {name: a, devices: L4}\n- {name: b, devices: L4}",
            "no link joins hosts a and b",
        ),
        (
            "hosts:\n- {name: a, devices: L4}\n- {name: a, devices: L4}",
            ":3: two hosts are named 'a'",
        ),
        (
            "devices: L4\nlinks: [{between: [local, x], latency: 1us, bandwidth: 1GB/s}]",
            "'x' is nei",
        ),
        (
            "hosts:\n- {name: a, devices: L4}\n- {name: b, devices: L4}\nlinks:\n"
            "- {between: [a, b], latency: 1us, bandwidth: 1GB/s}\n"
            "- {between: [b, a], latency: 1us, bandwidth: 2GB/s}",
            ":6: two links join a and b",
        ),
        (
            "devices: L4\nlinks: [{between: [local, local], latency: 1us, bandwidth: 1GB/s}]",
            ":2: a link joins 'local' to itself",
        ),
        (
            "hosts:\n- {name: node1, devices: L4}\n- {name: node2, devices: L4}\nlinks:\n"
            "- {between: [node1, nodee2], latency: 1us, bandwidth: 1GB/s}",
            ":5: 'nodee2' is neither a host nor a device; did you mean node2?",
        ),
        (
            "devices: L4\nsums: [{between: [local, b], points: {1KiB: 9us}}]",
            ":2: 'b' is neither a host nor a device",
        ),
        (
            "hosts:\n- {name: a, devices: [{kind: L4, name: b}]}\n- {name: b, devices: L4}\n"
            "network: {latency: 1us, bandwidth: 1GB/s}",
            "a host and a device are both named 'b'",
        ),
        (
            "devices: L4\nconstants:\n"
            "- {kind: L4, engine: shoal, precision: int8, eta: 0.8, layer: 40us, mfu: 0.5}\n"
            "- {kind: L4, engine: shoal, precision: int8, eta: 0.9, layer: 40us, mfu: 0.5}",
            ":4: constants of L4, shoal, int8 stand there twice",
        ),
        (
            "devices: L4\nconstants:\n"
            "- {kind: L4, engine: shoal, precision: int8, eta: 1, layer: 9us, mfu: 1, exposed: 2}",
            "exposed is '2'",
        ),
        ("devices: [{kind: L4, launch: 6ms}]", "launch is '6ms'"),
        ("devices: L4\ndisk: 3GB", ":2: disk is '3GB'; it must be a rate with its unit"),
        (
            "devices: L4\nnetwork: {latency: 20, bandwidth: 1GB/s}",
            ":2: latency is '20'; it must be",
        ),
        ("devices: L4\nnetwork: {latency: 20us}", ":2: network has no bandwidth"),
        ("devices: L4\nnetwork: {latency: 20us, bandwidth: 1kB/s}", "from 100 kB/s to 10 TB/s"),
        (f"devices: [{MEASURED.replace('24GB', '0GB')}]", ":1: memory is '0GB'; it must be a size"),
        (f"devices: [{MEASURED.replace('24GB', '24MB')}]", ":1: memory of 24 MB would be read in"),
        (f"devices: [{MEASURED.replace('24GB', '24TB')}]", "check both units"),
        (
            f"devices: [{MEASURED.replace('1000GB/s', '1000MB/s')}]",
            ":1: flops of 165 Tflops/s beside",
        ),
        (f"devices: [{MEASURED.replace('165T', '165G')}]", "check both units"),
        (f"devices: [{MEASURED.replace('1000GB/s', '1000')}]", "bandwidth is '1000'; it must be"),
        (
            "devices: [{kind: L4, bandwidth: 300MB/s}]",
            ":1: bandwidth is 300 MB/s; a L4 has 300 GB/s",
        ),
        ("devices: [{kind: L4, memory: 24TB}]", ":1: memory is 24 TB; a L4 has 24 GB"),
        ("devices: [{kind: XYZ-1}]", "'XYZ-1' is not in the catalogue, and there is no key memory"),
        ("devices: [{kind: L4, memry: 2GB}]", "unknown key 'memry'; did you mean memory?"),
        ("devices: [{kind: L4, speed: 0}]", "speed is '0'; it must be a number from 0.001"),
        (
            "devices: [{kind: cpu, count: 2, memory: 9GB, bandwidth: 9GB/s, flops: {float32: 1T}}]",
            "CPUs",
        ),
        ("devices: 2x L4 pcie4\nall_reduce: {1: {1KiB: 2us}}", "all_reduce has '1' ranks"),
        ("devices: 2x L4 pcie4\nall_reduce: {2: {1KiB: 0us}}", "it must be a time"),
        ("devices: 2x L4 pcie4\nlink: pcie4", ":2: link stands beside pcie4"),
        (
            "devices: L4\nnetwork: {latency: 1us, bandwidth: 1GB/s, points: {1GB: 1ms}}",
            "which bandwidth says; check both units",
        ),
        ("devices: L4\nconstants: [{kind: T4}]", ":2: constants have no engine"),
        ("devices: L4 # \x01", "may not be in YAML; remove it"),
        ('devices: "\\U00110000"', ":1: an escape in quotes is no character"),
        ('devices: "\\ud800"', "text without control characters"),
        ('devices: "L4\\0"', "text without control characters"),
        (
            "devices: 2x L4 pcie4\nall_reduce: {\u00b2: {1KiB: 2us}}",
            "all_reduce has '\u00b2' ranks",
        ),
    ],
)
def test_refusals_say_where_and_how(tmp_path: Path, text: str, complaint: str) -> None:
    found = _refused(tmp_path, text)
    assert complaint in found
    assert found.startswith("cluster.yaml:")


@pytest.mark.parametrize("kind", sorted(catalogue.kinds()))
def test_every_kind_of_the_catalogue_makes_a_device(kind: str) -> None:
    known = catalogue.kind(kind)
    device = known.device("x", "h", "cuda:0")
    flops_per_byte = device.flops_per_s("bfloat16") / device.bandwidth_bytes_per_s
    assert 10 < flops_per_byte < 600
    assert 0.01 < device.memory_bytes / device.bandwidth_bytes_per_s < 0.3
    assert known.link("pcie").bytes_per_s < known.pcie[1]
    assert "float16" in device.precisions


def test_errors_of_public_catalogues_are_not_ours() -> None:
    """Sparse or shader rates, other cards' memory and bandwidth: each once stood somewhere."""
    kinds = catalogue.kinds()
    flops = {name: dict(each.flops)["float16"] / 1e12 for name, each in kinds.items()}
    assert flops["MI300X"] == 1307
    assert flops["RTX-4090"] == pytest.approx(165.2)
    assert kinds["A100-40-SXM"].bandwidth_bytes_per_s == 1555e9
    assert kinds["A10"].memory_bytes == 24e9
    assert kinds["V100-SXM2-16"].memory_bytes == 16e9
    assert kinds["GB200"].bandwidth_bytes_per_s == 8000e9
    assert "bfloat16" not in kinds["T4"].precisions
    assert kinds["MI250X"].memory_bytes == 64e9


def test_all_reduce_tables_count_bytes() -> None:
    """The source counts elements of two bytes; 16 KiB on 8 H100s: 19 us in NCCL, 5.3 in vLLM."""
    tables = {
        (each.backend, each.num_ranks): dict(each.points)
        for each in catalogue.all_reduce_tables("H100-SXM", "nvlink")
    }
    assert tables["nccl", 8][16384] == pytest.approx(19.0e-6, rel=0.05)
    assert tables["custom", 8][16384] == pytest.approx(5.3e-6, rel=0.05)


HELIX = """\
[NodeNames]
total_compute_nodes=3
[ComputeNode-0]
type=L4
[ComputeNode-1]
type=T4x2
[ComputeNode-2]
type=A100
[Link-source-0]
bandwidth=1 * mbps
latency=9 * MilliSec
"""
PROFILES = """\
[SourceNode]
vram_size = -1
"""


def _helix(folder: Path, links: str, nodes: str = HELIX) -> Path:
    profile = (
        "inbound_nic_speed = 10 * gbps\noutbound_nic_speed = 10 * gbps\ndisk_speed = 1 * gbps\n"
    )
    sizes = {"L4": 24, "T4x2": 32, "A100": 40}
    text = "".join(f"[{kind}]\n{profile}vram_size = {size} * GB\n" for kind, size in sizes.items())
    (folder / "machine_profiles.ini").write_text(PROFILES + text)
    path = folder / "cluster.ini"
    path.write_text(nodes + links)
    return path


def _helix_links(pairs: dict[tuple[int, int], int]) -> str:
    return "".join(
        f"[Link-{a}-{b}]\nbandwidth={rate} * mbps\nlatency=1 * MilliSec\n"
        for (a, b), rate in pairs.items()
    )


def test_helix_file_loads(tmp_path: Path) -> None:
    every = dict.fromkeys(itertools.permutations(range(3), 2), 1000)
    path = _helix(tmp_path, _helix_links({**every, (2, 0): 100}))
    cluster = read_cluster(path)
    assert [each.kind for each in cluster.devices] == ["L4", "T4", "T4", "A100-40-SXM"]
    assert cluster.device("n1.1").memory_bytes == 16e9
    assert cluster.link("n0.0", "n1.0") == Link(latency_s=1e-3, bytes_per_s=1e9)
    assert cluster.link("n0.0", "n2.0").bytes_per_s == 100e6  # the slower direction


def test_helix_files_that_are_broken(tmp_path: Path) -> None:
    path = _helix(tmp_path, _helix_links({(0, 1): 1000}))
    with pytest.raises(ConfigError, match="no link joins hosts n0 and n2"):
        read_cluster(path)
    with pytest.raises(ConfigError, match=r"\[Link-0-7\] joins node 7"):
        read_cluster(_helix(tmp_path, _helix_links({(0, 7): 1000})))
    with pytest.raises(ConfigError, match="has type 'H900'"):
        read_cluster(_helix(tmp_path, "", HELIX.replace("type=L4", "type=H900")))
    with pytest.raises(ConfigError, match="has type 'T4x\u00b2'"):
        read_cluster(_helix(tmp_path, "", HELIX.replace("T4x2", "T4x\u00b2")))
    for rate in ("fast", "9" * 400 + " * mbps"):
        with pytest.raises(ConfigError, match="must be a product such as"):
            read_cluster(_helix(tmp_path, f"[Link-0-1]\nbandwidth={rate}\n"))
    with pytest.raises(ConfigError, match=r"is no \.ini file"):
        read_cluster(_helix(tmp_path, "[[[\nx"))
    path = _helix(tmp_path, "")
    (tmp_path / "machine_profiles.ini").unlink()
    with pytest.raises(ConfigError, match=r"machine_profiles\.ini beside it"):
        read_cluster(path)


def test_a_cluster_made_in_code_is_checked() -> None:
    device = catalogue.kind("L4").device("x", "h", "cuda:0")
    with pytest.raises(ConfigError, match="there is no host 'h'"):
        Cluster(hosts=(), devices=(device,))
    with pytest.raises(ConfigError, match="two devices of host h are cuda:0"):
        Cluster(hosts=(Host(name="h"),), devices=(device, _renamed(device, "y")))
    with pytest.raises(ConfigError, match="no link joins the devices of host h"):
        Cluster(hosts=(Host(name="h"),), devices=(device, _renamed(device, "y", "cuda:1")))
    joined = Between("x", "y", Link(latency_s=1e-5, bytes_per_s=1e9))
    cluster = Cluster(
        hosts=(Host(name="h"),),
        devices=(device, _renamed(device, "y", "cuda:1")),
        links=(joined,),
    )
    assert cluster.link("y", "x") == joined.link
    with pytest.raises(ConfigError, match="has no cuda:7; it has cuda:0, cuda:1"):
        cluster.at("h", "cuda:7")


def _renamed(device: Device, name: str, place: str = "cuda:0") -> Device:
    return catalogue.kind(device.kind).device(name, device.host, place)


def test_too_many_devices_are_counted_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object) -> None:
        pytest.fail("a device was made")

    monkeypatch.setattr(DeviceDraft, "device", made)
    hosts = "".join(f"- {{name: h{n}, devices: 1024x L4 pcie4}}\n" for n in range(5))
    found = _refused(tmp_path, f"hosts:\n{hosts}network: {{latency: 1us, bandwidth: 1GB/s}}\n")
    assert "the cluster has 5120 devices; 4096 at most" in found


def test_a_large_cluster_that_was_probed_is_read_again(tmp_path: Path) -> None:
    """Constants of each device in three precisions."""
    device = "{kind: cpu, memory: 8GiB, bandwidth: 9GB/s, flops: {int8: 90G}}"
    fitted = "engine: shoal, eta: 1, layer: 1us, mfu: 1"
    names = ("bfloat16", "int8", "int4")
    text = "\n".join(
        [
            "hosts:",
            *(f"- {{name: h{number}, devices: [{device}]}}" for number in range(100)),
            "network: {latency: 1us, bandwidth: 1GB/s}",
            "constants:",
            *(
                f"- {{device: h{number}.cpu, precision: {name}, {fitted}}}"
                for number in range(100)
                for name in names
            ),
        ]
    )
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    cluster = read_cluster(path)
    assert sum(bool(each.device) for each in cluster.constants) == 300
