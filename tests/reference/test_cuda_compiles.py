"""The CUDA kernels compile for the GPUs we name, and fit their shared memory: without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""What a program may have: A100, RTX 4090 (and other Ada, and 86), H100 and H200."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: compiling kernels needs the package triton (pip install)")
    result = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert {each["kernel"] for each in compiled} == {
        "_add_rms_norm",
        "_decode",
        "_dequantize",
        "_gated",
        "_merge",
        "_prefill",
        "_rms_norm",
        "_rope_and_store",
        "_tiles",
        "_vector",
    }
    for each in compiled:
        assert each["has_code"]
        assert each["shared_bytes"] <= SHARED_BYTES[capability], each
