"""What every test may ask for: a GPU (or a loud skip), and real models on disk.

    smollm2_gguf   the product's own catalogue model; SHOAL_TEST_SMOLLM2=FILE overrides
    gemma3_gguf    Gemma 3 270m, K-quants and a sliding window; SHOAL_TEST_GEMMA overrides

Where a model cannot be had the tests that need it are skipped, except under CI (the
environment variable CI is set), where they fail: CI that tests less says so.

With `-n 2` (pytest-xdist) all of tests/e2e runs in one process, in order, and files of the other
folders one by one in the other: servers wait most of their time, the others compute.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

from gemma3_download import fetch_gemma3

_NO_GPU = "no NVIDIA GPU here (torch.cuda.is_available() is False)"
_SLOW_FILE_S = 20.0

# How long an example takes says more about what else runs here than about the code.
settings.register_profile(
    "busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")


@pytest.hookimpl(trylast=True)  # after -m has dropped what nobody asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needs_gpu or _has_gpu():
        return
    for item in needs_gpu:
        item.add_marker(pytest.mark.skip(reason=_NO_GPU))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from by_folder import ByFolder  # imports pytest-xdist, which need not be there

    return ByFolder(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    _name_slow_files(terminalreporter)
    skipped = terminalreporter.stats.get("skipped", [])
    num_gpu = sum(
        "gpu" in report.keywords and _NO_GPU in str(report.longrepr) for report in skipped
    )
    if num_gpu:
        terminalreporter.write_line(
            f"NOT TESTED: {num_gpu} gpu tests were skipped: {_NO_GPU}", yellow=True, bold=True
        )


def _name_slow_files(terminalreporter: pytest.TerminalReporter) -> None:
    spent_s: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent_s[report.nodeid.partition("::")[0]] += report.duration
    slow = {name: seconds for name, seconds in spent_s.items() if seconds > _SLOW_FILE_S}
    for name in sorted(slow, key=slow.__getitem__, reverse=True):
        terminalreporter.write_line(f"slow: {slow[name]:4.0f} s  {name}")


def _has_gpu() -> bool:
    import torch  # not at the top: the pure tests run without it

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, fetched and cached the way a user's first `shoal serve` does."""
    if override := os.environ.get("SHOAL_TEST_SMOLLM2"):
        return _existing("SHOAL_TEST_SMOLLM2", override)
    from shoal.core.errors import ModelNotFoundError
    from shoal.model.store import resolve

    try:
        return resolve("smollm2-135m").path
    except ModelNotFoundError as error:
        _missing(f"smollm2-135m cannot be fetched: {error}")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270m instruct, Q4_K_M. Its licence is Google's Gemma Terms of Use: for tests only."""
    if override := os.environ.get("SHOAL_TEST_GEMMA"):
        return _existing("SHOAL_TEST_GEMMA", override)
    try:
        return fetch_gemma3(_cache_dir())
    except (OSError, RuntimeError) as error:
        _missing(f"Gemma 3 270m cannot be fetched: {error}")


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal-tests"


def _existing(variable: str, value: str) -> Path:
    path = Path(value)
    if not path.is_file():
        pytest.fail(f"{variable} is {value!r}, which is no file; unset it or name a .gguf file")
    return path


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
