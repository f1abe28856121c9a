"""The router's state machine under random arrivals, cancels and lost replicas."""

from __future__ import annotations

import dataclasses
import random

import pytest
from chain_worker import EOS, expected_output
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.request import ErrorInfo, GenerateRequest, Output, SamplingParams
from shoal.core.stats import EngineInfo
from shoal.router.events import (
    Abandon,
    AttemptFailed,
    Cancel,
    CancelAt,
    Deliver,
    Drain,
    Event,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    Send,
    Submit,
    Tick,
)
from shoal.router.state import RouterConfig, RouterState

VOCAB = 50
INFO = EngineInfo(
    max_model_len=100,
    num_kv_blocks=10,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_waiting=8,
    device="test",
    dtype="none",
)


def own_id(sent_id: str) -> str:
    """Of a request, by what a replica knows it as."""
    return sent_id.partition("~")[0]


class Fleet:
    """A router and pretend replicas that give the right next token of what they were sent."""

    def __init__(self, *names: str, seed: int = 0, **config: object) -> None:
        self.now = 0.0
        self.state = RouterState(
            RouterConfig(replicas=names, **config),  # type: ignore[arg-type]
            random.Random(seed),
        )
        self.incarnations = dict.fromkeys(names, -1)
        self.live: set[str] = set()
        self.running: dict[tuple[str, str], list[int]] = {}
        self.sent: dict[str, list[Send]] = {}
        self.delivered: dict[str, list[int]] = {}
        self.finished: dict[str, Output] = {}
        self.last: Output | None = None
        self.restarting: set[str] = set()

    def tell(self, event: Event) -> None:
        if isinstance(event, ReplicaReady):
            restarts = event.info.restarts
            (self.restarting.add if restarts else self.restarting.discard)(event.replica)
        for effect in self.state.handle(event, self.now):
            match effect:
                case Send(replica, request):
                    assert replica in self.live, "sent to a replica that is not there"
                    assert not (request.output_ids and replica in self.restarting), "it cannot"
                    self.sent.setdefault(own_id(request.request_id), []).append(effect)
                    self.running[replica, request.request_id] = [
                        *request.prompt_ids,
                        *request.output_ids,
                    ]
                case CancelAt(replica, request_id):
                    self.running.pop((replica, request_id), None)
                case Deliver(outputs):
                    for output in outputs:
                        self.take(output)
        self.state.check_integrity()

    def take(self, output: Output) -> None:
        assert output.request_id not in self.finished
        self.last = output
        self.delivered.setdefault(output.request_id, []).extend(output.token_ids)
        if output.finish is not None:
            self.finished[output.request_id] = output

    def up(self, name: str, **changed: int | bool) -> None:
        self.live.add(name)
        self.incarnations[name] += 1
        info = dataclasses.replace(INFO, **changed)  # type: ignore[arg-type]
        self.tell(ReplicaReady(name, self.incarnations[name], info))

    def fail(self, key: tuple[str, str], status: int = 502) -> None:
        """A replica fails at a request, and says so."""
        del self.running[key]
        replica, request_id = key
        error = ErrorInfo(status=status, code="broken", message="no")
        self.tell(AttemptFailed(replica, self.incarnations[replica], request_id, error))

    def down(self, name: str, *, final: bool = False) -> None:
        self.live.discard(name)
        self.running = {key: ids for key, ids in self.running.items() if key[0] != name}
        self.tell(ReplicaLost(name, max(self.incarnations[name], 0), "killed", final=final))

    def submit(self, request_id: str, prompt: list[int], max_tokens: int = 8) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        self.tell(
            Submit(
                GenerateRequest(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling)
            )
        )

    def produce(self, key: tuple[str, str]) -> None:
        """One token of one running request."""
        replica, request_id = key
        request = self.sent[own_id(request_id)][0].request
        ids = self.running[key]
        done = len(ids) - len(request.prompt_ids)
        want = expected_output(request.prompt_ids, request.sampling.max_tokens or 0, VOCAB)
        ids.append(want[done])
        finish = "stop" if want[done] == EOS else "length" if done + 1 == len(want) else None
        if finish:
            del self.running[key]
        output = Output(request_id=request_id, token_ids=(want[done],), finish=finish)
        self.tell(ReplicaOutputs(replica, self.incarnations[replica], [output]))

    def run_out(self) -> None:
        while self.running:
            self.produce(next(iter(self.running)))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), num_replicas=st.integers(1, 3))
def test_lost_replicas_lose_no_token(seed: int, num_replicas: int) -> None:
    rng = random.Random(seed)
    names = [f"r{i}" for i in range(num_replicas)]
    fleet = Fleet(*names, max_lost=1_000)
    fleet.up(names[0])
    prompts = {f"q{i}": [rng.randrange(1, VOCAB) for _ in range(5)] for i in range(30)}
    cancelled = set()
    for request_id, prompt in prompts.items():
        fleet.submit(request_id, prompt, max_tokens=12)
        for _ in range(rng.randrange(8)):
            if fleet.running:
                fleet.produce(rng.choice(list(fleet.running)))
        name = rng.choice(names)
        if rng.random() < 0.3:
            fleet.down(name) if name in fleet.live else fleet.up(name)
        if rng.random() < 0.1:
            cancelled.add(request_id)
            fleet.tell(Cancel(request_id))
    if not fleet.live:
        fleet.up(names[0])
    fleet.run_out()
    assert set(fleet.finished) == set(prompts)
    for request_id, prompt in prompts.items():
        want = expected_output(prompt, 12, VOCAB)
        if request_id in cancelled:
            assert fleet.delivered[request_id] == want[: len(fleet.delivered[request_id])]
        else:
            assert fleet.delivered[request_id] == want
    assert fleet.state.num_in_flight == 0
    assert set(fleet.state.outstanding().values()) == {0}


def test_the_least_loaded_replica_is_chosen() -> None:
    fleet = Fleet("a", "b")
    fleet.up("a")
    fleet.up("b")
    for i in range(4):
        fleet.submit(f"q{i}", [1, 2, 3])
    assert fleet.state.outstanding() == {"a": 2, "b": 2}


def test_a_missing_seed_is_drawn_once_and_kept() -> None:
    fleet = Fleet("a", "b")
    fleet.up("a")
    fleet.submit("q", [1, 2, 3])
    seed = fleet.sent["q"][0].request.sampling.seed
    assert seed is not None
    fleet.up("b")
    fleet.down("a")
    assert fleet.sent["q"][1].replica == "b"
    assert fleet.sent["q"][1].request.sampling.seed == seed


def test_requests_wait_for_the_first_replica_but_not_for_ever() -> None:
    fleet = Fleet("a", max_waiting=2, homeless_timeout_s=10.0)
    for i in range(3):
        fleet.submit(f"q{i}", [1, 2, 3])
    refused = fleet.finished["q2"].error
    assert refused is not None
    assert (refused.status, refused.code) == (429, "queue_full")
    fleet.now = 10.0
    fleet.tell(Tick())
    error = fleet.finished["q0"].error
    assert error is not None
    assert (error.status, error.code) == (503, "no_replica")


def test_a_replica_that_failed_for_good_fails_its_requests() -> None:
    fleet = Fleet("a")
    fleet.submit("q", [1, 2, 3])
    fleet.down("a", final=True)
    error = fleet.finished["q"].error
    assert error is not None
    assert error.status == 503
    fleet.submit("late", [1, 2, 3])
    assert fleet.finished["late"].error is not None


def test_a_request_that_keeps_losing_replicas_ends() -> None:
    fleet = Fleet("a", max_lost=3)
    fleet.up("a")
    fleet.submit("q", [1, 2, 3])
    for _ in range(3):
        fleet.down("a")
        fleet.up("a")
    error = fleet.finished["q"].error
    assert error is not None
    assert error.code == "replica_lost"


def test_news_of_an_older_incarnation_is_ignored() -> None:
    fleet = Fleet("a")
    fleet.up("a")
    fleet.submit("q", [1, 2, 3])
    fleet.down("a")
    fleet.up("a")
    fleet.tell(ReplicaOutputs("a", 0, [Output(request_id="q", token_ids=(7,), finish="length")]))
    assert "q" not in fleet.finished
    fleet.run_out()
    assert fleet.delivered["q"] == expected_output([1, 2, 3], 8, VOCAB)


def test_draining_admits_nothing_and_finishes_what_runs() -> None:
    fleet = Fleet("a")
    fleet.up("a")
    fleet.submit("running", [1, 2, 3])
    fleet.tell(Drain())
    fleet.submit("late", [1, 2, 3])
    error = fleet.finished["late"].error
    assert error is not None
    assert (error.status, error.code) == (503, "draining")
    fleet.run_out()
    assert fleet.finished["running"].error is None


def test_abandoned_requests_end_in_an_error_and_are_cancelled() -> None:
    fleet = Fleet("a")
    fleet.up("a")
    fleet.submit("q", [1, 2, 3])
    fleet.tell(Abandon())
    error = fleet.finished["q"].error
    assert error is not None
    assert error.code == "shutting_down"
    assert not fleet.running


@pytest.mark.parametrize("event", [Cancel("nobody"), Tick(), Drain()])
def test_events_about_nobody_are_harmless(event: Event) -> None:
    fleet = Fleet("a")
    fleet.tell(event)
    assert not fleet.finished


def test_a_successor_does_not_say_again_what_came_with_the_first_token() -> None:
    fleet = Fleet("a")
    fleet.up("a")
    sampling = SamplingParams(max_tokens=8, prompt_logprobs=2)
    fleet.tell(Submit(GenerateRequest(request_id="q", prompt_ids=(1, 2, 3), sampling=sampling)))
    fleet.produce(("a", "q"))
    fleet.down("a")
    fleet.up("a")
    first, second = (send.request for send in fleet.sent["q"])
    assert first.sampling.prompt_logprobs == 2
    assert second.sampling.prompt_logprobs is None
    fleet.tell(
        ReplicaOutputs("a", 1, [Output(request_id="q", token_ids=(5,), num_cached_tokens=16)])
    )
    assert fleet.last is not None
    assert fleet.last.num_cached_tokens is None
