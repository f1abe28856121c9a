"""What fewer bits cost, as published and by size; and the flags that plan and simulate judge."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.quality import loss_of, num_weights, of_mix, percent, rows


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["shoal", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    return int(left.value.code or 0), told.out, told.err


def test_a_model_of_published_shapes_has_its_own_loss() -> None:
    spec = read_spec(shape_folder("llama-3.1-8b"))
    assert percent(loss_of(spec, "int4").log_ratio) == pytest.approx(6.700147 / 6.231633 - 1)
    assert loss_of(spec, "int4").factor == 1.0
    assert loss_of(spec, "bfloat16").log_ratio == 0.0
    # Its shapes are those of LLaMA-7B, but for the experts.
    assert "by its size" in loss_of(read_spec(shape_folder("mixtral-8x7b")), "int4").source


def test_by_size_larger_models_lose_less_and_fewer_bits_more() -> None:
    spec = read_spec(shape_folder("qwen3-32b"))
    small = replace(spec, num_layers=8, layers=spec.layers[:8])
    assert num_weights(small) < num_weights(spec) < 33e9
    for precision in ("int8", "fp8", "int4"):
        own = loss_of(spec, precision)
        assert 0 < own.log_ratio < loss_of(small, precision).log_ratio
        assert own.factor >= 1
    assert loss_of(spec, "int8").log_ratio < loss_of(spec, "fp8").log_ratio
    assert loss_of(spec, "fp8").log_ratio < loss_of(spec, "int4").log_ratio


def test_the_size_s_rule_covers_what_it_was_made_of() -> None:
    spec = read_spec(shape_folder("qwen3-32b"))
    size = num_weights(spec)
    for precision in ("int8", "fp8", "int4"):
        own = loss_of(spec, precision)
        slope = math.log(
            loss_of(replace(spec, num_layers=8, layers=spec.layers[:8]), precision).log_ratio
            / own.log_ratio
        ) / math.log(num_weights(replace(spec, num_layers=8, layers=spec.layers[:8])) / size)
        for row in (each for each in rows() if each.precision == precision):
            told = own.log_ratio * (row.num_weights / size) ** slope
            assert row.log_ratio <= told * own.factor * 1.001


def test_a_mix_loses_by_its_layers() -> None:
    assert of_mix([(10, 0.0), (30, 0.04)]) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--engine", "nosuch"), "--engine is 'nosuch'; constants are known of shoal"),
        (("--max-quality-loss", "nan"), "from 0% to 100%"),
        (("--max-quality-loss", "-1"), "from 0% to 100%"),
        (("--precision", "bfloat16,"), "--precision has ''"),
        (("--kv-cache-precision", "int8,fp8"), "name one"),
        (("--objective", ""), "must be one of"),
        (("--slo", ""), "it needs ttft="),
        (("--emit", "tgi"), "must be one of"),
        (("--cluster", "/nosuch.yaml"), "No such file"),
    ],
)
def test_what_plan_refuses(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    said: str,
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("devices: 1x H100-SXM", encoding="utf-8")
    code, _, err = run(capsys, monkeypatch, "plan", "llama-3.1-8b", "--cluster", str(path), *flags)
    assert code == 2 and said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rate", "1e-320"), "a simulation takes 30 days at most"),
        (("--rate", "1", "--time-scale", "1e300"), "a simulation takes 30 days at most"),
        (("--rate", "1", "--engine", "nosuch"), "constants are known of"),
        (("--rate", "1", "--slo", ""), "it needs ttft="),
    ],
)
def test_what_simulate_refuses(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    said: str,
) -> None:
    cluster, plan = tmp_path / "cluster.yaml", tmp_path / "plan.yaml"
    cluster.write_text("devices: 1x H100-SXM", encoding="utf-8")
    own = ("--cluster", str(cluster))
    assert run(capsys, monkeypatch, "plan", "llama-3.1-8b", *own, "-o", str(plan))[0] == 0
    code, _, err = run(capsys, monkeypatch, "simulate", str(plan), *own, *flags)
    assert code == 2 and said in err


def test_the_loss_is_shown_and_kept_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("devices: 1x RTX-3090", encoding="utf-8")
    own = ("plan", "llama-3.1-8b", "--cluster", str(path))
    code, out, _ = run(capsys, monkeypatch, *own, "--precision", "int4", "--explain")
    assert code == 0 and "perplexity about 7.5 % above that of 16 bits" in out
    assert "as measured on Llama-3-8B" in out
    code, out, _ = run(capsys, monkeypatch, *own, "--max-quality-loss", "1%", "--json")
    told = json.loads(out)
    assert 0 <= told["quality_loss"] <= 0.01 and not told["unmet"]
    assert told["replicas"][0]["stages"][0]["precision"] in ("bfloat16", "int8")


def test_a_limit_that_memory_does_not_hold_gets_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("devices: 1x L40S", encoding="utf-8")
    own = ("plan", "llama-3.1-70b", "--cluster", str(path), "--max-quality-loss", "1%", "--json")
    code, out, _ = run(capsys, monkeypatch, *own)
    told = json.loads(out)
    assert code == 0 and told["quality_loss"] > 0.01
    assert "there is no memory for so many bits" in told["unmet"][0]
