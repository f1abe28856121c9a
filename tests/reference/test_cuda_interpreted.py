"""The CUDA kernels on a CPU: their tests once more, in Triton's interpreter.

In a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["test_cuda_kernels.py", "test_cuda_decoder.py"])
def test_in_the_interpreter(name: str) -> None:
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: Triton's interpreter needs the package triton (pip install)")
    if [int(part) for part in version("triton").split(".")[:2]] < [3, 7]:
        pytest.skip("NOT TESTED: the interpreter of Triton before 3.7 fails with today's numpy")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout
