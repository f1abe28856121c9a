"""Each check of a machine: facts that trip it, and facts that don't."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_cases import CARD, CASES, GOOD, GPU, machine, memory
from fake_nvml import FakeNvml, h100

from shoal.cli.doctor import MACHINE_CHECKS
from shoal.cluster.topology import Nic
from shoal.core.errors import ConfigError
from shoal.doctor.facts import Machine
from shoal.doctor.finding import Finding, examine
from shoal.doctor.gather import read_machine, relevant
from shoal.doctor.report import as_json, lines, read_report, worst
from shoal.doctor.versions import VERSION_CHECKS


def verdicts(name: str, facts: Machine) -> list[Finding]:
    return [found for found in examine("here", MACHINE_CHECKS, facts) if found.check == name]


@pytest.mark.parametrize(("name", "facts", "status", "words"), CASES)
def test_check(name: str, facts: Machine, status: str, words: str) -> None:
    found = verdicts(name, facts)
    assert status in {finding.status for finding in found if words in finding.found}, found
    for finding in found:
        assert bool(finding.remedy) == (finding.status in ("warn", "fail"))
        assert finding.why


def test_every_check_is_held_to_facts_that_trip_it_and_facts_that_do_not() -> None:
    for check in MACHINE_CHECKS:
        statuses = {status for name, _, status, _ in CASES if name == check.name}
        assert statuses & {"warn", "fail"} and statuses & {"ok", "skipped"}, check.name


@pytest.mark.parametrize(
    ("pattern", "status", "words"),
    [
        ("eth", "ok", "takes eth0"),
        ("=eth0", "ok", "takes eth0"),
        ("^docker", "ok", "eth0"),
        ("eth1,docker", "warn", "takes docker0; eth0 is faster"),
        ("=eth", "fail", "matches no interface"),
        ("slow", "fail", "interfaces that are down"),
    ],
)
def test_interfaces_that_nccl_would_take(pattern: str, status: str, words: str) -> None:
    nics = (
        CARD,
        Nic(name="docker0", is_up=True, is_virtual=True),
        Nic(name="slow0", is_up=False, bytes_per_s=1e9),
    )
    facts = machine(nics=nics, variables={"NCCL_SOCKET_IFNAME": pattern})
    (found,) = verdicts("network choice", facts)
    assert (found.status, words in found.found) == (status, True), found.found


def test_what_machines_must_have_alike() -> None:
    here = machine(GPU, nics=(CARD,))
    other = replace(here, name="there")
    same = examine("both", VERSION_CHECKS, (here, other))
    assert {finding.status for finding in same} == {"ok"}
    strange = replace(
        other,
        software=replace(GOOD, shoal="0.2.0", torch="2.11.0"),
        topology=replace(other.topology, driver="550.1", nics=(replace(CARD, mtu=1500),)),
        variables={"NCCL_ALGO": "Tree", "NCCL_SOCKET_IFNAME": "eth9"},
    )
    found = examine("both", VERSION_CHECKS, (here, strange))
    bad = {finding.found.split(" differ")[0]: finding.status for finding in found}
    assert bad["shoal"] == "fail"
    assert {bad[name] for name in ("torch", "driver", "NCCL_ALGO", "frames")} == {"warn"}
    assert not any("NCCL_SOCKET_IFNAME" in finding.found for finding in found)


def test_a_report_is_read_back(tmp_path: Path) -> None:
    facts = machine(GPU, nics=(CARD,), variables={"NCCL_DEBUG": "INFO"})
    found = examine("here", MACHINE_CHECKS, facts)
    (tmp_path / "there.json").write_text(as_json(found, facts))
    assert read_report(tmp_path / "there.json") == facts


@pytest.mark.parametrize("content", ["", "{}", '{"machine": {"name": 3}}', "[" * 100_000])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "there.json").write_text(content)
    with pytest.raises(ConfigError, match="no report of a machine"):
        read_report(tmp_path / "there.json")


def test_a_report_says_what_to_mend_first_and_the_rest_when_asked() -> None:
    found = examine("machine here", MACHINE_CHECKS, memory(huge_pages="never"))
    short = [text for _, text in lines(found, everything=False)]
    full = [text for _, text in lines(found, everything=True)]
    assert short[0] == "machine here" and "--all" in short[-1]
    assert any(text.startswith("huge pages") for text in short)
    assert not any(text.startswith("overcommit") for text in short)
    assert any(text.startswith("overcommit") for text in full)
    assert worst(found) == "warn"
    assert worst(examine("", MACHINE_CHECKS, memory(available_bytes=0))) == "fail"
    assert worst(()) == "ok"


def test_facts_are_gathered_from_the_system(tmp_path: Path) -> None:
    for name, content in {
        "proc/cpuinfo": "model name\t: Test CPU\nflags\t\t: fpu avx2 avx512f\n",
        "proc/self/cgroup": "0::/box/inner\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000",
        "sys/fs/cgroup/box/inner/cpu.max": "max 100000",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "powersave",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_driver": "acpi-cpufreq",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        "proc/sys/vm/overcommit_memory": "2",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module 580",
        "sys/bus/pci/devices/0000:10:00.0/iommu_group/type": "DMA-FQ",
        "etc/nccl.conf": "# ours\nNCCL_ALGO = Ring\nrubbish\n",
        "home/me/.nccl.conf": "NCCL_PROTO=LL",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = read_machine(
            GOOD,
            {"HOME": "/home/me", "NCCL_PROTO": "Simple", "SECRET_KEY": "x"},
            cache=tmp_path / "not" / "there",
            port=taken.getsockname()[1],
            root=tmp_path,
            nvml=FakeNvml([h100(0)]),
        )
    assert found.processor.model == "Test CPU"
    assert found.processor.flags == {"fpu", "avx2", "avx512f"}
    assert found.processor.quota_cpus == 1.5
    assert (found.processor.governors, found.processor.frequency_driver) == (
        ("powersave",),
        "acpi-cpufreq",
    )
    assert (found.memory.huge_pages, found.memory.never_overcommits) == ("never", True)
    assert found.memory.total_bytes >= found.memory.available_bytes > 0
    assert found.room.port_is_taken
    assert found.room.cache_free_bytes is not None
    assert found.software.open_driver and not found.software.peer_memory
    assert found.software.translates_peers is True
    assert found.variables == {"NCCL_PROTO": "Simple"}
    assert (found.variable("NCCL_PROTO"), found.variable("NCCL_ALGO")) == ("Simple", "Ring")
    assert len(found.topology.gpus) == 1


def test_only_variables_of_our_libraries_are_kept() -> None:
    kept = relevant({"OMP_NUM_THREADS": "2", "HF_TOKEN": "secret", "NCCL_X": "y" * 1000})
    assert kept.keys() == {"OMP_NUM_THREADS", "NCCL_X"}
    assert len(kept["NCCL_X"]) == 400
