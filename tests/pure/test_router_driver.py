"""The router's driver: what a slow reader gets, and when an engine's process is ended."""

from __future__ import annotations

import asyncio
import random
import sys

import pytest

from shoal.core.clock import MonotonicClock
from shoal.core.errors import ConfigError
from shoal.core.options import EngineOptions
from shoal.core.request import ErrorInfo, GenerateRequest, Output, SamplingParams, TokenLogprobs
from shoal.core.stats import Computed, EngineStats
from shoal.router.driver import Router
from shoal.router.engine_client import EngineClient
from shoal.router.inbox import Inbox
from shoal.router.state import RouterConfig, RouterState
from shoal.router.watchdog import Watchdog, WatchdogLimits

BUSY = EngineStats(num_running=1, computed=Computed(steps=5))
LOGPROB = TokenLogprobs(1, -0.5, 1)


def read_all(outputs: list[Output]) -> list[Output]:
    """What a reader gets that comes when all outputs are there."""

    async def read() -> list[Output]:
        inbox = Inbox()
        for output in outputs:
            inbox.put(output, 0.0)
        read = [await inbox.get()]
        while read[-1].finish is None:
            read.append(await inbox.get())
        return read

    return asyncio.run(read())


def test_a_reader_that_fell_behind_gets_all_at_once() -> None:
    first = Output(
        request_id="q",
        token_ids=(1,),
        logprobs=(LOGPROB,),
        prompt_logprobs=(LOGPROB, LOGPROB),
        num_cached_tokens=16,
    )
    last = Output(
        request_id="q", token_ids=(2, 3), logprobs=(LOGPROB,) * 2, finish="stop", stop_token_id=3
    )
    assert read_all([first, last]) == [
        Output(
            request_id="q",
            token_ids=(1, 2, 3),
            logprobs=(LOGPROB,) * 3,
            prompt_logprobs=(LOGPROB, LOGPROB),
            finish="stop",
            stop_token_id=3,
            num_cached_tokens=16,
        )
    ]


def test_tokens_before_an_error_come_before_it() -> None:
    tokens = [Output(request_id="q", token_ids=(token,)) for token in (1, 2)]
    failure = ErrorInfo(status=503, code="replica_lost", message="gone")
    failed = Output(request_id="q", finish="error", error=failure)
    assert read_all([*tokens, failed]) == [Output(request_id="q", token_ids=(1, 2)), failed]


def test_a_reader_that_keeps_up_gets_each_as_it_comes() -> None:
    outputs = [Output(request_id="q", token_ids=(token,)) for token in range(5)]

    async def read() -> list[Output]:
        inbox, got = Inbox(), []
        for output in outputs:
            reading = asyncio.create_task(inbox.get())
            await asyncio.sleep(0)
            inbox.put(output, 0.0)
            got.append(await reading)
        return got

    assert asyncio.run(read()) == outputs


def test_a_reader_that_waits_is_woken_only_for_what_was_not_taken() -> None:
    outputs = [Output(request_id="q", token_ids=(token,)) for token in range(6)]
    asked: list[tuple[int, ...]] = []

    def take(output: Output, now: float) -> bool:
        assert now == 7.0
        asked.append(output.token_ids)
        return output.token_ids != (3,)

    async def read() -> list[Output]:
        inbox = Inbox(take)
        inbox.put(outputs[0], 7.0)  # nobody waits
        got = [await inbox.get()]
        reading = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        for output in outputs[1:5]:  # the one after 3 must not overtake it
            inbox.put(output, 7.0)
        got.append(await reading)
        reading = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.sleep(0)
        inbox.put(outputs[5], 7.0)  # nobody waits any more
        return [*got, await inbox.get()]

    got = asyncio.run(read())
    assert [output.token_ids for output in got] == [(0,), (3, 4), (5,)]
    assert asked == [(1,), (2,), (3,)]


def test_an_engine_is_ended_for_silence_and_for_steps_that_hang() -> None:
    limits = WatchdogLimits(silence_s=10.0, step_s=100.0)
    silent = Watchdog(limits, 0.0)
    silent.heard(BUSY, 5.0)
    assert silent.complaint(15.0, _runs) is None
    assert silent.complaint(15.1, _runs) == "the engine did not answer for 10 s"

    hanging = Watchdog(limits, 0.0)
    for second in range(101):
        hanging.heard(BUSY, float(second))
        assert hanging.complaint(float(second), _runs) is None
    hanging.heard(BUSY, 100.5)
    assert hanging.complaint(100.5, _runs) == "the engine finished no Step for 100 s"


def test_an_engine_that_works_or_rests_is_left_alone() -> None:
    watchdog = Watchdog(WatchdogLimits(silence_s=10.0, step_s=20.0), 0.0)
    for second in range(0, 200, 5):
        watchdog.heard(EngineStats(num_running=1, computed=Computed(steps=second)), float(second))
        assert watchdog.complaint(second + 4.0, _runs) is None
    for second in range(200, 400, 5):
        watchdog.heard(EngineStats(num_running=0, computed=Computed(steps=200)), float(second))
        assert watchdog.complaint(second + 4.0, _runs) is None


def test_a_stopped_engine_is_ended_sooner_but_not_for_a_pause() -> None:
    watchdog = Watchdog(WatchdogLimits(silence_s=10.0, stopped_s=3.0), 0.0)
    watchdog.heard(BUSY, 5.0)
    assert watchdog.complaint(8.0, _is_stopped) is None
    assert watchdog.complaint(8.1, _runs) is None
    assert "stopped" in (watchdog.complaint(8.1, _is_stopped) or "")
    watchdog.heard(BUSY, 8.1)
    assert watchdog.complaint(8.2, _is_stopped) is None


def _runs() -> bool:
    return False


def _is_stopped() -> bool:
    return True


@pytest.mark.parametrize("name", ["silence_s", "stopped_s", "step_s"])
@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_limits_below_the_heartbeat_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        WatchdogLimits(**{name: value})


# Ready at once, then never a word.
MUTE_ENGINE = """
import socket, sys, time
from shoal.core.stats import EngineInfo
from shoal.wire.channel import Codec
from shoal.wire.messages import Ready, ToEngine

info = EngineInfo(
    max_model_len=100, num_kv_blocks=10, max_num_seqs=4, max_num_batched_tokens=16, max_waiting=8,
    device="test", dtype="none",
)
engine = socket.socket(fileno=int(sys.argv[1]))
engine.sendall(Codec(ToEngine).encode(Ready(info)))
time.sleep(600)
"""
STOPPED_ENGINE = MUTE_ENGINE.replace(
    "time.sleep(600)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
)


@pytest.mark.parametrize(
    ("program", "limits", "said"),
    [
        (MUTE_ENGINE, {"silence_s": 2.0}, "the engine did not answer for 2 s and was ended"),
        (
            STOPPED_ENGINE,
            {"silence_s": 600.0, "stopped_s": 2.0},
            "the engine process was stopped, said nothing for 2 s and was ended",
        ),
    ],
)
def test_a_mute_engine_is_ended_and_that_is_what_is_said(
    program: str, limits: dict[str, float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve() -> Output:
        client = EngineClient(
            "mute",
            [sys.executable, "-c", program],
            EngineOptions(model_path=""),
            lambda loading: None,
            WatchdogLimits(grace_s=0.1, **limits),
        )
        config = RouterConfig(replicas=("mute",), max_lost=1)
        state = RouterState(config, random.Random(0))
        async with Router(state, [client], MonotonicClock()) as router:
            request = GenerateRequest(
                request_id="q", prompt_ids=(1,), sampling=SamplingParams(max_tokens=4)
            )
            (output,) = [output async for output in router.generate(request)]
            while "starting it again" not in caplog.text:
                await asyncio.sleep(0.01)
        return output

    output = asyncio.run(asyncio.wait_for(serve(), 120))
    assert output.error is not None
    assert output.error.code == "replica_lost"
    assert f"mute: {said}" in caplog.text
    assert "out of memory" not in caplog.text
