"""benchmarks/gpu.py itself: in small and on a CPU, so that it works when a GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_through(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--output", str(output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "FAILED" not in result.stdout
    found = json.loads(output.read_text())
    assert found["bandwidth_bytes_per_s"] > 0
    names = [name for name, _ in found["table"]]
    parts = ("bandwidth", "host memory", "kernel tests", "linear int4", "attention", "batch 3")
    for part in parts:
        assert any(part in name for name in names), f"{part} is missing"
    for weight_format in ("bf16", "fp8", "int8", "int4"):
        assert found["sections"][f"tiny {weight_format} prefill 32"]["tokens_per_s"] > 0
        assert found["sections"][f"tiny-moe {weight_format} prefill 32"]["tokens_per_s"] > 0
    mixture = found["sections"]["tiny-moe bf16 decode, batch 3"]
    assert mixture["experts_expected"] == pytest.approx(8 * (1 - (6 / 8) ** 3))
    assert 2 <= mixture["experts_used"] <= 6
    assert found["sections"]["tiny-moe transformers, batch 1"]["step_s"] > 0
