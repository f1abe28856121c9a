"""The CUDA kernels compile for the GPUs we name, and fit their shared memory: without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}
"""What a program may have. To the compiler, Ampere (A100: 163 KiB) and Ada (RTX 4090: 99 KiB) are
nearly one; compiled is the older, which lacks fp8, held to what the other has. 90: H100, H200."""


@pytest.mark.slow
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: compiling kernels needs the package triton (pip install)")
    compilers = {
        capability: subprocess.Popen(
            [sys.executable, str(HERE / "compile_kernels.py"), str(capability)],
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in SHARED_BYTES
    }
    said = {capability: each.communicate() for capability, each in compilers.items()}
    for capability, (output, errors) in said.items():
        assert compilers[capability].returncode == 0, errors[-4000:]
        check(capability, [json.loads(line) for line in output.splitlines()])


def check(capability: int, compiled: list[dict[str, Any]]) -> None:
    assert {each["kernel"] for each in compiled} == {
        "_add_rms_norm",
        "_decode",
        "_dequantize",
        "_expert_counts",
        "_expert_places",
        "_expert_tiles_down",
        "_expert_tiles_up",
        "_expert_vector_down",
        "_expert_vector_up",
        "_gated",
        "_merge",
        "_prefill",
        "_rms_norm",
        "_rope_and_store",
        "_route",
        "_tiles",
        "_vector",
    }
    for each in compiled:
        assert each["has_code"]
        assert each["shared_bytes"] <= SHARED_BYTES[capability], each
