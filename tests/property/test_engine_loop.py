"""The live loop and the in-process executor, with a worker that has no model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from chain_worker import ChainWorkers, expected_output

from shoal.core.clock import MonotonicClock
from shoal.core.errors import InvalidRequestError
from shoal.core.request import GenerateRequest, Grammar, Output, SamplingParams
from shoal.core.stats import EngineStats
from shoal.core.step import (
    InstancesReady,
    SequenceStart,
    Step,
    StepFailure,
    StepResult,
    StepRow,
)
from shoal.engine.config import EngineConfig
from shoal.engine.events import Cancel, Submit
from shoal.engine.loop import MAX_FAILURES_IN_A_ROW, EngineLoop
from shoal.engine.sequence import GrammarMatcher
from shoal.engine.state import EngineState
from shoal.executor.inproc import InprocExecutor

VOCAB = 1000
START = SequenceStart(token_ids=(1, 2), prompt_len=2, sampling=SamplingParams(), eos_token_ids=(0,))


@dataclass
class Done:
    result: StepResult
    done: bool = True

    def wait(self) -> StepResult:
        return self.result


class LiveWorker:
    """A chain worker behind the executor's interface; fails when told to."""

    def __init__(self, num_blocks: int) -> None:
        self._chain = ChainWorkers((num_blocks,), VOCAB)
        self.failures_left = 0
        self.num_resets = 0

    def launch(self, step: Step) -> Done:
        time.sleep(0.001)
        if self.failures_left:
            self.failures_left -= 1
            raise RuntimeError("the device said no")
        return Done(self._chain.run(step))

    def reset(self) -> None:
        self.num_resets += 1
        self._chain.reset()


class Client:
    """Collects outputs and waits for ends."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, Output] = {}
        self._changed = threading.Condition()

    def report(self, outputs: list[Output], _stats: EngineStats) -> None:
        with self._changed:
            for output in outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish is not None:
                    self.finished[output.request_id] = output
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=60), "nothing came in 60 s"


def refuse(_grammar: Grammar, _prefix: tuple[int, ...]) -> GrammarMatcher:
    raise InvalidRequestError("no such schema", code="invalid_json_schema")


@contextmanager
def running(worker: LiveWorker) -> Iterator[tuple[EngineLoop, Client]]:
    config = EngineConfig(
        instance_blocks=(100,), max_model_len=200, vocab_size=VOCAB, eos_token_ids=(0,)
    )
    client = Client()
    executor = InprocExecutor(worker)
    with ThreadPoolExecutor(1) as threads:
        loop = EngineLoop(
            EngineState(config),
            executor,
            compile_grammar=refuse,
            threads=threads,
            report=client.report,
            clock=MonotonicClock(),
        )
        thread = threading.Thread(target=loop.run)
        thread.start()
        yield loop, client
        loop.stop()
        thread.join(60)
        assert not thread.is_alive()
        executor.close()


def request(request_id: str, prompt: list[int], **sampling: object) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": 20, **sampling}),  # type: ignore[arg-type]
    )


def test_many_requests_from_many_threads() -> None:
    with running(LiveWorker(100)) as (loop, client):
        prompts = {f"q{i}": [i + 1] * (i % 40 + 1) for i in range(100)}
        with ThreadPoolExecutor(8) as threads:
            for request_id, prompt in prompts.items():
                threads.submit(loop.post, Submit(request(request_id, prompt)))
        client.wait(lambda: len(client.finished) == 100)
    for request_id, prompt in prompts.items():
        assert client.tokens[request_id] == expected_output(prompt, 20, VOCAB)


def test_a_failed_step_is_tried_again_with_nothing_lost() -> None:
    worker = LiveWorker(100)
    with running(worker) as (loop, client):
        loop.post(Submit(request("q", [1, 2, 3], max_tokens=100)))
        client.wait(lambda: len(client.tokens.get("q", [])) > 5)
        worker.failures_left = 1
        client.wait(lambda: "q" in client.finished)
    assert client.tokens["q"] == expected_output([1, 2, 3], 100, VOCAB)
    assert worker.num_resets == 1


def test_workers_that_are_started_again_and_again_do_not_end_the_loop() -> None:
    with running(LiveWorker(100)) as (loop, client):
        for incarnation in range(2 * MAX_FAILURES_IN_A_ROW):
            loop.post(
                StepFailure(step_id=None, reason="it died", incarnation=incarnation, down=(0,))
            )
            loop.post(InstancesReady((0,)))
        loop.post(Submit(request("q", [1, 2, 3])))
        client.wait(lambda: "q" in client.finished)
    assert client.tokens["q"] == expected_output([1, 2, 3], 20, VOCAB)


def test_what_fails_between_two_steps_ends_no_request() -> None:
    """A block that does not get onto a full device, say."""
    worker, done = LiveWorker(100), threading.Event()

    def fail() -> None:
        done.set()
        raise RuntimeError("out of memory")

    executor = InprocExecutor(worker)
    executor.between_steps(fail)
    assert done.wait(60)
    came = threading.Event()
    executor.listen(lambda event: came.set())
    row = StepRow(sequence_id=1, start=0, token_ids=(1, 2), block_ids=((0,),), start_state=START)
    executor.submit(Step(step_id=0, rows=(row,)))
    assert came.wait(60), "the worker's thread is gone"
    executor.close()


def test_a_cancelled_request_ends_at_once() -> None:
    with running(LiveWorker(100)) as (loop, client):
        loop.post(Submit(request("q", [1, 2, 3], max_tokens=150)))
        client.wait(lambda: len(client.tokens.get("q", [])) > 2)
        loop.post(Cancel("q"))
        client.wait(lambda: "q" in client.finished)
    assert client.finished["q"].finish == "cancelled"


def test_a_refused_grammar_ends_its_request_alone() -> None:
    with running(LiveWorker(100)) as (loop, client):
        loop.post(Submit(request("bad", [1], grammar=Grammar(kind="json_schema", schema="{"))))
        loop.post(Submit(request("good", [1])))
        client.wait(lambda: len(client.finished) == 2)
    error = client.finished["bad"].error
    assert error is not None
    assert error.code == "invalid_json_schema"
    assert client.tokens["good"] == expected_output([1], 20, VOCAB)


def test_idle_time_brings_heartbeats() -> None:
    beats = []

    class Listener(Client):
        def report(self, outputs: list[Output], stats: EngineStats) -> None:
            beats.append(stats)
            super().report(outputs, stats)

    config = EngineConfig(instance_blocks=(10,), max_model_len=100, vocab_size=VOCAB)
    executor = InprocExecutor(LiveWorker(10))
    listener = Listener()
    with ThreadPoolExecutor(1) as threads:
        loop = EngineLoop(
            EngineState(config),
            executor,
            compile_grammar=refuse,
            threads=threads,
            report=listener.report,
            clock=MonotonicClock(),
        )
        thread = threading.Thread(target=loop.run)
        thread.start()
        listener.wait(lambda: len(beats) >= 1)
        loop.stop()
        thread.join(60)
        executor.close()
    assert beats[0].num_blocks == 10
