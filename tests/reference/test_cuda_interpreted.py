"""The CUDA kernels on a CPU: their tests once more, in Triton's interpreter.

In processes of their own, side by side: TRITON_INTERPRET must be set before Triton is imported.
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
TESTS = ("test_cuda_kernels.py", "test_cuda_decoder.py", "test_cuda_experts.py")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_the_interpreter() -> None:
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: Triton's interpreter needs the package triton (pip install)")
    if [int(part) for part in version("triton").split(".")[:2]] < [3, 7]:
        pytest.skip("NOT TESTED: the interpreter of Triton before 3.7 fails with today's numpy")
    # Tiny products by the thousand: threads only get into each other's way (5 times slower).
    env = {**os.environ, "TRITON_INTERPRET": "1", **dict.fromkeys(THREADS, "1")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in TESTS
    ]
    for process, (output, _) in [(each, each.communicate()) for each in processes]:
        assert process.returncode == 0, output[-6000:]
        assert " passed" in output
