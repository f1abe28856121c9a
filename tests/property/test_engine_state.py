"""The engine's state machine under random arrivals, cancels, failures and preemptions."""

from __future__ import annotations

import random

import pytest
from chain_worker import EOS, expected_output
from engine_bench import VOCAB, Bench, make_config, make_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.core.errors import InvalidRequestError
from shoal.core.request import ErrorInfo, GenerateRequest, Grammar, SamplingParams
from shoal.engine.events import Cancel, GrammarFailed, GrammarReady, GrammarStarted, Submit


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    depth=st.integers(1, 4),
    num_blocks=st.sampled_from([13, 20, 40, 200]),
    budget=st.sampled_from([6, 24, 100]),
    prefix_caching=st.booleans(),
)
def test_outputs_depend_on_prompts_alone(
    seed: int, depth: int, num_blocks: int, budget: int, prefix_caching: bool
) -> None:
    """Random arrivals, shared prefixes, priorities, cancels and failed Steps."""
    rng = random.Random(seed)
    bench = Bench(
        make_config(
            instance_blocks=(num_blocks,),
            max_steps_in_flight=depth,
            max_num_batched_tokens=budget,
            prefix_caching=prefix_caching,
            max_step_failures=1_000,
        )
    )
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(80))] for _ in range(3)]
    requests: dict[str, GenerateRequest] = {}
    cancelled: set[str] = set()
    for i in range(60):
        # Some prompts are the same, and differ by their seeds alone.
        own = [rng.randrange(1, VOCAB) for _ in range(rng.choice([0, 0, 5, 30]))]
        prompt = rng.choice(prefixes) + own or [1]
        request = make_request(
            f"r{i}",
            prompt,
            max_tokens=rng.randrange(1, 60),
            priority=rng.randrange(3),
            seed=rng.randrange(3),
        )
        requests[request.request_id] = request
        bench.submit(request)
        if rng.random() < 0.2:
            victim = f"r{rng.randrange(i + 1)}"
            cancelled.add(victim)
            bench.tell(Cancel(victim))
        if rng.random() < 0.05:
            bench.fail_step()
        for _ in range(rng.randrange(6)):
            bench.step()
    bench.run_out()

    assert set(bench.finished) == set(requests), "each request ends exactly once"
    for request_id, request in requests.items():
        sampling = request.sampling
        want = expected_output(request.prompt_ids, sampling.max_tokens or 0, VOCAB, sampling.seed)
        got = bench.outputs[request_id]
        if bench.finished[request_id].finish == "cancelled":
            assert request_id in cancelled
            assert got == want[: len(got)]
        else:
            assert got == want
            assert bench.finished[request_id].finish == ("stop" if want[-1] == EOS else "length")


def test_thousands_of_requests_leave_no_block_behind() -> None:
    rng = random.Random(1)
    bench = Bench(make_config(instance_blocks=(18,)))
    for i in range(2000):
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 90))]
        bench.submit(make_request(f"r{i}", prompt, max_tokens=rng.randrange(1, 90)))
        if rng.random() < 0.3:
            bench.tell(Cancel(f"r{rng.randrange(i + 1)}"))
        while len(bench.outputs) - len(bench.finished) > 12:
            bench.step()
    bench.run_out()
    assert len(bench.finished) == 2000
    assert bench.state.stats().preemptions > 0, "the test must reach preemption"


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 39])
def test_a_continued_request_goes_on_where_it_was_cut(cut: int) -> None:
    prompt = [7, 8, 9] * 5
    want = expected_output(prompt, 40, VOCAB)
    cut = min(cut, len(want) - 1)
    bench = Bench(make_config())
    bench.submit(make_request("r", prompt, max_tokens=40, output_ids=tuple(want[:cut])))
    bench.run_out()
    assert bench.outputs["r"] == want


def test_a_request_cut_after_its_last_token_ends_at_once() -> None:
    prompt = [7, 8, 9]
    want = expected_output(prompt, 20, VOCAB)
    bench = Bench(make_config())
    bench.submit(make_request("r", prompt, max_tokens=20, output_ids=tuple(want)))
    assert bench.finished["r"].finish in ("stop", "length")
    assert not bench.steps


def test_prefix_of_an_earlier_request_is_not_computed_again() -> None:
    bench = Bench(make_config(max_num_batched_tokens=128))
    prompt = [3] * 100
    bench.submit(make_request("a", prompt, max_tokens=1))
    bench.run_out()
    bench.submit(make_request("b", prompt, max_tokens=1))
    assert bench.steps[0].num_tokens == 100 - 96
    bench.run_out()
    assert bench.outputs["a"] == bench.outputs["b"]
    assert bench.state.stats().cached_tokens == 96


def test_what_steps_have_computed_is_counted() -> None:
    bench = Bench(make_config(max_num_batched_tokens=24, max_steps_in_flight=1))
    bench.submit(make_request("a", [3] * 50, max_tokens=4))
    bench.run_out()
    computed = bench.state.stats().computed
    assert computed.prompt_tokens == 50
    assert computed.prompt_pairs == pytest.approx(50 * 50 / 2)
    assert computed.steps == 3 + 3, "three chunks, then a token each"
    bench.submit(make_request("b", [3] * 48 + [4] * 10, max_tokens=1))
    bench.run_out()
    assert bench.state.stats().computed.prompt_tokens == 50 + 10, "what was cached is not computed"


def test_another_salt_shares_nothing() -> None:
    bench = Bench(make_config(max_num_batched_tokens=128))
    bench.submit(make_request("a", [3] * 100, max_tokens=1, salt="tenant a"))
    bench.run_out()
    bench.submit(make_request("b", [3] * 100, max_tokens=1, salt="tenant b"))
    assert bench.steps[0].num_tokens == 100


def test_siblings_share_a_prompt_that_is_still_being_computed() -> None:
    bench = Bench(make_config(max_num_batched_tokens=400))
    for i in range(4):
        bench.outputs[f"r{i}"] = []
    bench.tell(*(Submit(make_request(f"r{i}", [5] * 97, max_tokens=2)) for i in range(4)))
    assert bench.steps[0].num_tokens == 97 + 3 * 1
    bench.run_out()
    assert len({tuple(bench.outputs[f"r{i}"]) for i in range(4)}) == 1


def test_urgent_requests_go_first_and_may_displace() -> None:
    bench = Bench(make_config(max_num_seqs=2, max_num_batched_tokens=24))
    long = [
        p for p in ([i] * 20 for i in range(1, VOCAB)) if len(expected_output(p, 50, VOCAB)) == 50
    ]
    for i in range(4):
        bench.submit(make_request(f"slow{i}", long[i], max_tokens=50, priority=5))
    for _ in range(5):
        bench.step()
    bench.submit(make_request("urgent", [9] * 20, max_tokens=3, priority=-1))
    bench.run_out()
    order = list(bench.finished)
    assert order[0] == "urgent"
    assert bench.outputs["slow3"] == expected_output(long[3], 50, VOCAB)


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    bench = Bench(make_config(max_num_seqs=2, max_waiting=3))
    for i in range(6):
        bench.submit(make_request(f"r{i}", [i + 1] * 5))
    refused = bench.finished["r5"]
    assert refused.error is not None
    assert (refused.error.status, refused.error.code) == (429, "queue_full")
    assert (refused.error.retry_after_s or 0) > 0
    bench.run_out()


def test_a_request_past_its_time_limit_ends_in_a_timeout() -> None:
    bench = Bench(make_config())
    bench.submit(make_request("r", [5] * 20, max_tokens=100, timeout_s=0.025))
    assert bench.state.next_deadline() == pytest.approx(0.025)
    while bench.steps and bench.now < 1.0:
        bench.step()
    error = bench.finished["r"].error
    assert error is not None
    assert (error.status, error.code) == (504, "timeout")
    bench.run_out()


@pytest.mark.parametrize(
    ("prompt", "code"),
    [([], "empty_prompt"), ([5] * 200, "context_length_exceeded"), ([VOCAB], "invalid_token_id")],
)
def test_wrong_requests_are_refused(prompt: list[int], code: str) -> None:
    bench = Bench(make_config())
    bench.submit(make_request("r", prompt))
    error = bench.finished["r"].error
    assert error is not None
    assert (error.status, error.code) == (400, code)


def test_one_poisonous_request_takes_no_other_with_it() -> None:
    bench = Bench(make_config(max_num_batched_tokens=100))
    prompts = {f"r{i}": [i + 1] * 20 for i in range(6)}
    for request_id, prompt in prompts.items():
        bench.submit(make_request(request_id, prompt, max_tokens=30))
    for _ in range(10_000):
        if not bench.steps:
            break
        poison = any(row.token_ids[:1] == (4,) for row in bench.steps[0].rows if row.start < 16)
        bench.fail_step() if poison else bench.step()
    error = bench.finished["r3"].error
    assert error is not None
    assert error.status == 500
    for request_id in prompts.keys() - {"r3"}:
        assert bench.outputs[request_id] == expected_output(prompts[request_id], 30, VOCAB)


def test_waiting_for_a_compiler_is_not_held_against_a_grammar() -> None:
    bench = Bench(make_config(grammar_timeout_s=5.0))
    bench.submit(grammar_request("g"))
    bench.now = 60.0
    bench.tell(GrammarStarted("g"))
    bench.now = 64.0
    bench.tell(GrammarReady("g", OnlyEven()))
    bench.run_out()
    assert bench.finished["g"].finish == "stop"


def test_an_idle_night_does_not_make_retry_after_a_day() -> None:
    bench = Bench(make_config(max_num_seqs=1, max_waiting=1))
    for hour in range(3):
        bench.now = hour * 36_000.0
        bench.submit(make_request(f"r{hour}", [5] * 5, max_tokens=2))
        bench.run_out()
    for i in range(3):
        bench.submit(make_request(f"late{i}", [5] * 5))
    refused = bench.finished["late2"].error
    assert refused is not None
    assert 0 < (refused.retry_after_s or 0) <= 10
    bench.run_out()


def test_a_step_that_always_fails_ends_its_requests() -> None:
    bench = Bench(make_config(max_step_failures=2))
    bench.submit(make_request("r", [5] * 10))
    for _ in range(3):
        bench.fail_step()
    error = bench.finished["r"].error
    assert error is not None
    assert error.status == 500


def test_the_worker_is_told_when_sequences_are_over() -> None:
    bench = Bench(make_config())
    for i in range(20):
        bench.submit(make_request(f"r{i}", [i + 1] * 10, max_tokens=5))
    bench.run_out()
    bench.submit(make_request("last", [1] * 10, max_tokens=5))
    bench.run_out()
    assert bench.workers.num_known_sequences <= 2


class OnlyEven:
    """A grammar: even tokens, four of them, then EOS."""

    def __init__(self, prefix: tuple[int, ...] = ()) -> None:
        self.taken = len(prefix)

    def mask(self) -> bytes:
        allowed = {EOS} if self.taken >= 4 else set(range(2, VOCAB, 2))
        return sum(1 << token for token in allowed).to_bytes(8, "little")

    def advance(self, token_id: int) -> bool:
        self.taken += 1
        return token_id % 2 == 0


def grammar_request(request_id: str, **fields: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=20, grammar=Grammar(kind="json_object"))
    return GenerateRequest(
        request_id=request_id,
        prompt_ids=(3, 4, 5),
        sampling=sampling,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_a_grammar_masks_every_token_and_others_run_meanwhile(depth: int) -> None:
    bench = Bench(make_config(max_steps_in_flight=depth))
    bench.submit(grammar_request("g"))
    bench.submit(make_request("plain", [6] * 20))
    assert [effect.request_id for effect in bench.compiling] == ["g"]
    for _ in range(3):
        bench.step()
    bench.tell(GrammarReady("g", OnlyEven()))
    bench.run_out()
    *body, last = bench.outputs["g"]
    assert last == EOS
    assert len(body) == 4
    assert all(token % 2 == 0 and token != EOS for token in body)
    assert bench.outputs["plain"] == expected_output([6] * 20, 8, VOCAB)


def test_a_continued_grammar_starts_from_its_committed_tokens() -> None:
    whole = Bench(make_config())
    whole.submit(grammar_request("g"))
    whole.tell(GrammarReady("g", OnlyEven()))
    whole.run_out()
    want = whole.outputs["g"]

    bench = Bench(make_config())
    bench.submit(grammar_request("g", output_ids=tuple(want[:2])))
    (wanted,) = bench.compiling
    bench.tell(GrammarReady("g", OnlyEven(wanted.prefix_ids)))
    bench.run_out()
    assert bench.outputs["g"] == want


def test_a_grammar_that_fails_or_never_compiles_ends_its_request() -> None:
    bench = Bench(make_config(grammar_timeout_s=5.0))
    bench.submit(grammar_request("bad"))
    bench.submit(grammar_request("slow"))
    bench.tell(GrammarStarted("slow"))
    refusal = ErrorInfo.of(InvalidRequestError("no such type", code="invalid_json_schema"))
    bench.tell(GrammarFailed("bad", refusal))
    assert bench.finished["bad"].error == refusal
    bench.now = 5.0
    bench.tell()
    error = bench.finished["slow"].error
    assert error is not None
    assert (error.status, error.code) == (400, "grammar_timeout")
    bench.tell(GrammarReady("slow", OnlyEven()))
    bench.run_out()
