"""`shoal serve --plan FILE --cluster FILE`: the plan says what runs where, the cluster how fast."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shoal.cli import serving
from shoal.cli.main import main
from shoal.cli.serving import ServeSettings

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
PLAN = "replicas:\n  - stages: [{devices: [cpu]}]\n  - stages: [{devices: [cpu]}]\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def served(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, list[ServeSettings]]:
    """Exit code, and what would have been served."""
    found: list[ServeSettings] = []

    def run(settings: ServeSettings, *_: object) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr(serving, "run", run)
    monkeypatch.setattr(serving, "start_engines", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["shoal", "serve", "--port", "0", *flags])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0), found


def test_a_plan_has_the_speeds_of_a_cluster(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cluster = tmp_path / "plan.yaml", tmp_path / "cluster.yaml"
    plan.write_text(PLAN)
    cluster.write_text("devices: 1x A100-40-SXM\n")
    flags = (str(model), "--plan", str(plan), "--cluster", str(cluster))
    code, (settings,) = served(monkeypatch, *flags)
    assert (code, settings.cluster, len(settings.replicas)) == (0, cluster, 2)


def test_widths_and_a_cluster_are_two_wishes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("devices: 2x A100-40-SXM\n")
    flags = (str(model), "--tensor-parallel-size", "2", "--cluster", str(cluster))
    code, found = served(monkeypatch, *flags)
    assert code and not found and "--cluster stands beside flags" in capsys.readouterr().err
