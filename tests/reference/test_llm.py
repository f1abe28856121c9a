"""`LLM` when things go wrong: nobody waits for ever, and nothing is left behind.

Each call that could hang runs in a thread with a limit, so that a hang is a failure.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from shoal import LLM, SamplingParams
from shoal.core.errors import ConfigError, InvalidRequestError, UnavailableError
from shoal.engine.state import EngineState

pytestmark = pytest.mark.slow

LONG = SamplingParams(max_tokens=1000, ignore_eos=True, temperature=0.0)
SHORT = SamplingParams(max_tokens=2, temperature=0.0)
LIMIT_S = 30.0

T = TypeVar("T")


def within_limit(call: Callable[[], T]) -> T:
    """What the call gives or raises; TimeoutError if it hangs."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 -- raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(LIMIT_S)


def open_llm(path: Path) -> LLM:
    return LLM(str(path), num_threads=1, max_model_len=2048, kv_cache_memory_bytes=200 << 20)


LIMITS = [
    ({"max_model_len": 10**6}, "--max-model-len is 1000000"),
    ({"max_num_batched_tokens": 8}, "--max-num-batched-tokens is 8"),
]


@pytest.mark.parametrize(("options", "words"), LIMITS)
def test_wrong_limits_are_told_before_anything_is_loaded(
    options: dict[str, int], words: str, smollm2_gguf: Path
) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=words):
        LLM(str(smollm2_gguf), say=said.append, **options)
    assert said == []


def test_an_option_out_of_range_is_told_before_the_model_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="--num-threads"):
        LLM("no/such-model", num_threads=0)


LEFT_RUNNING = """
import sys
from shoal import LLM, SamplingParams

llm = LLM(sys.argv[1], num_threads=1, max_model_len=2048, kv_cache_memory_bytes=200 << 20)
print(next(llm.stream("Once", SamplingParams(max_tokens=1000, ignore_eos=True))).token_ids)
"""


def test_a_script_may_end_with_a_model_at_work(smollm2_gguf: Path) -> None:
    command = [sys.executable, "-c", LEFT_RUNNING, str(smollm2_gguf)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with open_llm(smollm2_gguf) as llm:
        yield llm


def wait_until_idle(llm: LLM) -> None:
    end = time.monotonic() + 60
    while llm.stats.num_running or llm.stats.num_waiting:
        assert time.monotonic() < end, f"work goes on: {llm.stats}"
        time.sleep(0.05)


@pytest.mark.parametrize("prompts", [[["a"]], [[1.5] * 40], 5, [5.0], ["a", None]], ids=str)
def test_prompts_of_the_wrong_type_are_refused_and_the_engine_lives(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="token ids"):
        within_limit(lambda: llm.generate(prompts, SHORT))
    with pytest.raises(InvalidRequestError, match="output_ids"):
        within_limit(lambda: llm.generate(["a"], SHORT, output_ids=[["x"]]))  # type: ignore[list-item]
    assert len(within_limit(lambda: llm.generate([1, 2], SHORT))[0].token_ids) == 2


def test_a_stop_string_alone(llm: LLM) -> None:
    count = within_limit(
        lambda: llm.generate(
            "1, 2, 3, 4,", SamplingParams(max_tokens=20, temperature=0.0, stop="7, 8")
        )
    )
    assert count[0].text == " 5, 6, "


def test_one_refused_prompt_takes_the_others_with_it(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        within_limit(lambda: llm.generate([[10**7], *[[1] * 20] * 8], LONG))
    wait_until_idle(llm)


def test_an_interrupted_caller_leaves_no_work(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.text.completion.CompletionStream.result", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        within_limit(lambda: llm.generate([[1] * 20] * 8, LONG))
    wait_until_idle(llm)


def _interrupted(_stream: object) -> None:
    time.sleep(0.3)
    raise KeyboardInterrupt


def test_close_ends_streams_refuses_calls_and_gives_the_memory_back(smollm2_gguf: Path) -> None:
    gc.collect()
    memory = psutil.Process().memory_info
    llm = open_llm(smollm2_gguf)
    chunks = llm.stream([1, 2, 3], LONG)
    next(chunks)
    open_rss = memory().rss
    llm.close()
    with pytest.raises(UnavailableError, match="closed"):
        within_limit(lambda: list(chunks))
    with pytest.raises(UnavailableError, match="closed"):
        within_limit(lambda: llm.generate([1, 2], SHORT))
    llm.close()
    assert llm.max_model_len == 2048
    gc.collect()
    assert memory().rss < open_rss - (50 << 20)


def test_when_the_engines_thread_dies_every_caller_hears_of_it(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = open_llm(smollm2_gguf)
    chunks = llm.stream([1, 2, 3], LONG)
    next(chunks)

    def broken(*_args: object) -> None:
        raise RuntimeError("lost its bearings")

    monkeypatch.setattr(EngineState, "handle", broken)
    for call in (lambda: list(chunks), lambda: llm.generate([1, 2], SHORT)):
        with pytest.raises(UnavailableError, match="lost its bearings"):
            within_limit(call)
    assert "the engine's thread died" in caplog.text
    within_limit(llm.close)
