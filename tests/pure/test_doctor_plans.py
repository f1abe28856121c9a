"""Each check of cluster files and plans: ones that trip it, and ones that don't."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.cluster.cluster_file import read_cluster
from shoal.core.model_spec import ModelSpec
from shoal.doctor.cluster_file import CLUSTER_CHECKS
from shoal.doctor.finding import Finding, examine
from shoal.doctor.plan import PLAN_CHECKS, place
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.plan_file import read_plan

MEASURED = "memory: 22GiB, bandwidth: {rate}GB/s, flops: {{float16: 60T}}"


def card(rate: int, kind: str = "RTX-3090") -> str:
    return f"{{kind: {kind}, {MEASURED.format(rate=rate)}}}"


def host(name: str, *devices: str, link: str = "pcie4") -> str:
    return f"{{name: {name}, devices: [{', '.join(devices)}], link: {link}}}"


def cluster_of(*hosts: str, network: str = "latency: 20us, bandwidth: 100Gbit/s") -> str:
    return f"hosts: [{', '.join(hosts)}]\nnetwork: {{{network}}}\n"


PAIR = cluster_of(host("a", card(850), card(840)), host("b", card(850), card(840)))
CATALOGUE = cluster_of(
    "{name: a, devices: 2x H100-SXM nvlink}", "{name: b, devices: 4x A100-40-SXM pcie4}"
)
FITTED = (
    "constants: [{kind: RTX-3090, engine: shoal, precision: int8, "
    "eta: 0.8, layer: 40us, mfu: 0.5}]\n"
)


def statuses(found: tuple[Finding, ...], check: str) -> dict[str, str]:
    return {each.found: each.status for each in found if each.check == check}


@pytest.mark.parametrize(
    ("check", "text", "status", "words"),
    [
        ("measured", PAIR, "ok", "all 4"),
        ("measured", CATALOGUE, "warn", "6 of 6"),
        ("names", CATALOGUE, "skipped", "no measured"),
        ("names", cluster_of(host("a", card(400), card(850))), "warn", "a.0 has 43% of the band"),
        ("alike", PAIR, "ok", "4 RTX-3090 are alike"),
        ("alike", cluster_of(host("a", card(850), card(850), card(600))), "warn", "a.2: less than"),
        ("alike", CATALOGUE, "skipped", "no two"),
        ("links inside", PAIR, "ok", "2 pairs"),
        (
            "links inside",
            cluster_of(host("a", card(850), card(850), link="{latency: 9us, bandwidth: 3GB/s}")),
            "warn",
            "a.0 and a.1 exchange 3.0 GB/s",
        ),
        ("links inside", cluster_of(host("a", card(850))), "skipped", "no host"),
        ("network", PAIR, "ok", "10 Gbit/s"),
        ("network", cluster_of(host("a", card(850))), "skipped", "one host"),
        (
            "network",
            cluster_of(
                host("a", card(850)),
                host("b", card(850)),
                network="latency: 2ms, bandwidth: 1Gbit/s",
            ),
            "warn",
            "1 Gbit/s, 2,000 us",
        ),
        ("constants", PAIR, "warn", "nothing was fitted on RTX-3090"),
        ("constants", PAIR + FITTED, "ok", "each kind"),
    ],
)
def test_cluster_check(tmp_path: Path, check: str, text: str, status: str, words: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    found = examine("it", CLUSTER_CHECKS, read_cluster(tmp_path / "cluster.yaml"))
    assert status in {s for said, s in statuses(found, check).items() if words in said}, found
    assert all(bool(each.remedy) == (each.status in ("warn", "fail")) for each in found)


def test_a_measured_device_as_good_as_its_name_says_nothing_of_names(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(PAIR)
    found = examine("it", CLUSTER_CHECKS, read_cluster(tmp_path / "cluster.yaml"))
    assert statuses(found, "names") == {}


SPEC = read_spec(shape_folder("llama-3.1-8b"))


def examined(
    tmp_path: Path, cluster: str, plan: str, spec: ModelSpec = SPEC
) -> tuple[Finding, ...]:
    (tmp_path / "cluster.yaml").write_text(cluster)
    (tmp_path / "plan.yaml").write_text(plan)
    placed = place(
        read_plan(tmp_path / "plan.yaml").resolve(spec),
        read_cluster(tmp_path / "cluster.yaml"),
        spec,
        "bfloat16",
        "bfloat16",
    )
    return examine("it", PLAN_CHECKS, placed)


def stage(layers: str, *places: str, more: str = "") -> str:
    devices = ", ".join(
        f"{{device: {'cpu' if number == 'cpu' else f'cuda:{number}'}, host: {name}}}"
        for name, _, number in (each.partition(".") for each in places)
    )
    return f"  - {{layers: {layers}, devices: [{devices}]{more}}}\n"


def plan(*stages: str) -> str:
    return "stages:\n" + "".join(stages)


CPUS = cluster_of(
    "{name: a, devices: [{kind: cpu, memory: 64GiB, bandwidth: 60GB/s, flops: {bfloat16: 4T}}]}",
    "{name: b, devices: [{kind: cpu, memory: 64GiB, bandwidth: 60GB/s, flops: {bfloat16: 4T}}, "
    "1x L4], link: pcie4}",
)
SLOW = cluster_of(
    host("a", card(850)), host("b", card(850)), network="latency: 500us, bandwidth: 1Gbit/s"
)
TIGHT = cluster_of(host("a", card(850).replace("22GiB", "17GiB")))
UNLIKE = cluster_of(host("a", "1x H100-SXM", "1x A100-40-SXM"))
GOOD = plan(stage("0-32", "a.0", "a.1"))


@pytest.mark.parametrize(
    ("check", "cluster", "written", "status", "words"),
    [
        ("plan precisions", CATALOGUE, GOOD, "ok", "every device"),
        (
            "plan precisions",
            CATALOGUE,
            plan(stage("0-32", "b.0", more=", quantize: fp8")),
            "fail",
            "b.0 (A100-40-SXM) has no kernels for fp8",
        ),
        ("plan memory", CATALOGUE, GOOD, "ok", "left for KV"),
        ("plan memory", TIGHT, plan(stage("0-32", "a.0")), "warn", "left for KV of 18.3 GB"),
        (
            "plan memory",
            PAIR,
            plan(stage("0-32", "a.0", more=", dtype: float32")),
            "fail",
            "too little of 23.6 GB",
        ),
        (
            "plan memory",
            CATALOGUE,
            plan(stage("0-32", "a.0", more=", kv_cache_memory: 100GiB")),
            "fail",
            "too little of 80.0 GB",
        ),
        ("fast links", CATALOGUE, GOOD, "ok", "a.0 and a.1 exchange"),
        ("fast links", CATALOGUE, plan(stage("0-32", "a.0", "b.0")), "warn", "a.0 and a.1"),
        ("fast links", CATALOGUE, plan(stage("0-32", "a.0")), "skipped", "no layers"),
        ("sums", CATALOGUE, GOOD, "ok", "sums take"),
        ("sums", SLOW, plan(stage("0-32", "a.0", "b.0")), "warn", "between hosts"),
        ("transports", CATALOGUE, GOOD, "ok", "NCCL"),
        ("transports", CPUS, plan(stage("0-32", "a.cpu", "b.cpu")), "warn", "gloo"),
        ("transports", CPUS, plan(stage("0-32", "b.cpu", "b.0")), "fail", "both CPUs and GPUs"),
        ("stages", CATALOGUE, GOOD, "skipped", "several stages"),
        (
            "stages",
            CATALOGUE,
            plan(stage("0-16", "a.0"), stage("16-32", "a.1")),
            "ok",
            "replica 0: stages take",
        ),
        (
            "stages",
            CATALOGUE,
            plan(stage("0-4", "a.0"), stage("4-32", "a.1")),
            "warn",
            "wait for stage 1",
        ),
        ("ranks", CATALOGUE, GOOD, "ok", "its ranks compute"),
        ("ranks", UNLIKE, GOOD, "warn", "the others wait for a.1"),
        (
            "ranks",
            UNLIKE,
            plan(stage("0-32", "a.0", "a.1", more=", split: [2.0, 1.0]")),
            "ok",
            "its ranks compute",
        ),
    ],
)
def test_plan_check(
    tmp_path: Path, check: str, cluster: str, written: str, status: str, words: str
) -> None:
    found = examined(tmp_path, cluster, written)
    assert status in {s for said, s in statuses(found, check).items() if words in said}, found
    assert all(bool(each.remedy) == (each.status in ("warn", "fail")) for each in found)


def test_a_group_on_the_cpus_of_one_host_sums_in_shared_memory(tmp_path: Path) -> None:
    found = examined(tmp_path, CPUS, plan(stage("0-32", "a.cpu", "a.cpu")))
    (said,) = statuses(found, "transports")
    assert "shared memory" in said


@pytest.mark.parametrize(
    ("cluster", "plan_text", "more", "code"),
    [
        (PAIR + FITTED, None, [], 0),
        (PAIR, None, [], 0),
        (PAIR, None, ["--strict"], 1),
        (CATALOGUE, plan(stage("0-32", "b.0", more=", quantize: fp8")), [], 1),
        ("hosts: 3", None, [], 2),
        (PAIR, plan(stage("0-99", "a.0")), [], 2),
        (PAIR, plan(stage("0-32", "z.0")), [], 2),
        (PAIR, None, ["--with", "other.json"], 2),
        (None, GOOD, [], 2),
        (PAIR, None, ["--model", "llama-3.1-8b"], 2),
    ],
)
def test_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cluster: str | None,
    plan_text: str | None,
    more: list[str],
    code: int,
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "nothing was probed"))
    command = ["shoal", "doctor", "--json", *more]
    if plan_text is not None:
        command += ["--model", "llama-3.1-8b"]
    for flag, text in (("--cluster", cluster), ("--plan", plan_text)):
        if text is not None:
            (tmp_path / f"{flag}.yaml").write_text(text)
            command += [flag, str(tmp_path / f"{flag}.yaml")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert (left.value.code or 0) == code, said
    if code == 2:
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    else:
        assert json.loads(said.out)["findings"]
