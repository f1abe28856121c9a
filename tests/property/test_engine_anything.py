"""All that can happen to an engine at once: every block comes back, every request ends once.

Requests of all kinds, cancels, time limits, failures, drained and slow instances, KV that is lent,
received and copied between instances. Tokens, lent KV and prompt log-probabilities are compared
with what they must be at every turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from chain_worker import EOS, link, next_token
from engine_bench import VOCAB, make_config, make_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_routes import fail_at_random, random_routes
from test_route_moves import CopyingBench

from shoal.core.errors import InvalidRequestError
from shoal.core.kv import KVArrived, KVHop, KVLoan, KVOffer, KVPull
from shoal.core.request import ErrorInfo, GenerateRequest, Grammar, SamplingParams, TokenLogprobs
from shoal.core.step import BLOCK_SIZE, StepResult, StepRow
from shoal.engine.blocks import block_names, root_name
from shoal.engine.events import (
    Cancel,
    CompileGrammar,
    DrainInstance,
    DropKV,
    EndLease,
    EndLoan,
    GrammarFailed,
    GrammarReady,
    GrammarStarted,
    GrowLoan,
    InstancesSlow,
    Lend,
    LendKV,
    LendPrefix,
    PullKV,
    Receive,
    StopKV,
    TellPulled,
)

SALTS = ("", "tenant")


class Multiples:
    """A grammar: so many multiples of three, then EOS."""

    def __init__(self, prefix: tuple[int, ...] = (), length: int = 6) -> None:
        self.taken, self.length = len(prefix), length

    def mask(self) -> bytes:
        allowed = {EOS} if self.taken >= self.length else set(range(3, VOCAB, 3))
        return sum(1 << token for token in allowed).to_bytes(8, "little")

    def advance(self, token_id: int) -> bool:
        self.taken += 1
        return token_id % 3 == 0


@dataclass
class Truth:
    """What a request's tokens and KV must be.

    Attributes:
        kv: of each layer, position by position.
    """

    request: GenerateRequest
    num_layers: int
    output: list[int] = field(default_factory=list)
    finish: str = "length"

    def __post_init__(self) -> None:
        self.kv: list[list[int]] = [[] for _ in range(self.num_layers)]
        for token_id in self.request.prompt_ids:
            self._take(token_id)
        sampling = self.request.sampling
        matcher = Multiples() if sampling.grammar is not None else None
        while len(self.output) < (sampling.max_tokens or 0):
            chain = self.kv[-1][-1]
            token_id = next_token(chain, VOCAB, sampling.seed)
            if matcher is not None:
                bits = int.from_bytes(matcher.mask(), "little")
                allowed = [token for token in range(VOCAB) if bits >> token & 1]
                token_id = allowed[chain % len(allowed)]
            self.output.append(token_id)
            self._take(token_id)
            may_stop = matcher is not None or len(self.output) >= sampling.min_tokens
            is_end = token_id in sampling.stop_token_ids
            is_end |= token_id == EOS and not (sampling.ignore_eos and matcher is None)
            if may_stop and is_end:
                self.finish = "stop"
                break
            if matcher is not None:
                matcher.advance(token_id)

    @property
    def names(self) -> list[bytes]:
        tokens = [*self.request.prompt_ids, *self.output]
        full = len(tokens) // BLOCK_SIZE * BLOCK_SIZE
        return block_names(root_name("", self.request.salt), tokens[:full])

    def block(self, index: int, layer: int) -> list[int]:
        return self.kv[layer][index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]

    def _take(self, token_id: int) -> None:
        value = token_id
        for of_layer in self.kv:
            value = link(of_layer[-1] if of_layer else 0, value)
            of_layer.append(value)


@dataclass
class AnyBench(CopyingBench):
    """With others that borrow KV and offer some; told the truth of every request."""

    truths: dict[str, Truth] = field(default_factory=dict)
    blocks: dict[bytes, tuple[Truth, int]] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    loans: dict[int, tuple[KVLoan, tuple[bytes, ...]]] = field(default_factory=dict)
    offers: dict[int, KVOffer] = field(default_factory=dict)
    pulls: dict[int, KVPull] = field(default_factory=dict)
    starts: dict[int, StepRow] = field(default_factory=dict)

    def know(self, truth: Truth) -> None:
        self.truths[truth.request.request_id] = truth
        for index, name in enumerate(truth.names):
            self.blocks.setdefault(name, (truth, index))

    def tell(self, *events: object) -> None:
        super().tell(*events)  # type: ignore[arg-type]
        for loan, names in self.loans.values():
            self._check_loan(loan, names)

    def give(self, result: StepResult) -> None:
        """With log-probabilities of prompts, whose logprob says which position they are of."""
        step = self.in_flight[result.step_id]
        rows = [
            replace(each, prompt_logprobs=self._logprobs(row))
            for row, each in zip(step.rows, result.rows, strict=True)
        ]
        super().give(replace(result, rows=tuple(rows)))

    def finish_pull(self, pull_id: int, rng: random.Random) -> None:
        """Some of it came, the rest of its blocks hold something wrong."""
        pull, offer = self.pulls.pop(pull_id), self.offers[pull_id]
        counts = tuple(rng.randint(0, len(hop.block_ids)) for hop in pull.hops)
        for hop, count in zip(pull.hops, counts, strict=True):
            for number, block in enumerate(hop.block_ids):
                for layer in range(hop.layers.start, hop.layers.stop):
                    if number < count:
                        self._write(hop, block, layer, offer.names[pull.first + number])
                    else:
                        self.workers.instances[hop.instance].spoil(block, layer)
        self.tell(KVArrived(pull_id, counts))

    def run_out(self) -> None:
        for _ in range(3):  # leases end, pulls are stopped, then dropped
            self.now += 1000.0
            self.tell()
        assert not (self.loans or self.pulls or self.offers)
        assert not self.asked, "a lease was never answered"
        super().run_out()

    def _logprobs(self, row: StepRow) -> tuple[TokenLogprobs, ...]:
        start = self.starts[row.sequence_id].start_state
        assert start is not None
        if start.sampling.prompt_logprobs is None:
            return ()
        positions = range(row.start + 1, min(row.end + 1, start.prompt_len))
        return tuple(TokenLogprobs(start.token_ids[at], -float(at), 1, ()) for at in positions)

    def _check_loan(self, loan: KVLoan, names: tuple[bytes, ...]) -> None:
        """What may be read is what its names say."""
        for hop in loan.hops:
            slots = self.workers.instances[hop.instance]._slots
            for block, name in zip(hop.block_ids[: loan.num_ready], names, strict=False):
                truth, index = self.blocks[name]
                for layer in range(hop.layers.start, hop.layers.stop):
                    first = block * BLOCK_SIZE
                    there = [slots.get((slot, layer)) for slot in range(first, first + BLOCK_SIZE)]
                    assert there == truth.block(index, layer), "lent KV is of something else"

    def _write(self, hop: KVHop, block: int, layer: int, name: bytes) -> None:
        truth, index = self.blocks[name]
        values = truth.block(index, layer)
        instance = self.workers.instances[hop.instance]
        before = truth.kv[layer][index * BLOCK_SIZE - 1] if index else 0
        for offset, value in enumerate(values):
            instance._slots[block * BLOCK_SIZE + offset, layer] = value
            instance._before[value] = (values[0], before)

    def _carry_out(self, effect: object) -> None:
        match effect:
            case LendKV(loan, names):
                self.asked.remove(loan.lease_id)
                if names:
                    self.loans[loan.lease_id] = loan, names
            case GrowLoan(loan):
                before, names = self.loans[loan.lease_id]
                assert loan.num_ready >= before.num_ready
                self.loans[loan.lease_id] = loan, names
            case EndLoan(number) if number > 0:
                del self.loans[number]
            case PullKV(pull):
                self.pulls[pull.pull_id] = pull
            case StopKV(number) if number > 0:
                assert number in self.offers
            case DropKV(number) if number > 0:
                self.pulls.pop(number, None)
            case TellPulled(number, num):
                assert 0 <= num <= len(self.offers.pop(number).names)
                assert number not in self.pulls
            case CompileGrammar(request_id):
                assert request_id not in self.finished
                super()._carry_out(effect)
            case _:
                for row in getattr(getattr(effect, "step", None), "rows", ()):
                    if row.start_state is not None:
                        self.starts[row.sequence_id] = row
                super()._carry_out(effect)


def random_request(rng: random.Random, number: int, prefixes: list[list[int]]) -> GenerateRequest:
    own = [rng.randrange(1, VOCAB) for _ in range(rng.choice([0, 0, 5, 30]))]
    max_tokens = rng.choice([1, 2, 16, rng.randrange(1, 60)])
    request = make_request(
        f"r{number}",
        rng.choice(prefixes) + own or [1],
        priority=rng.randrange(3),
        salt=rng.choice(SALTS),
        timeout_s=rng.choice([None, None, None, 0.0, rng.random() * 5]),
    )
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
        seed=rng.randrange(3),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=rng.choice([(), (), (5, 7)]),
        prompt_logprobs=rng.choice([None, None, None, 0]),
        grammar=Grammar(kind="json_object") if rng.random() < 0.15 else None,
    )
    return replace(request, sampling=sampling)


def something_else(bench: AnyBench, rng: random.Random, number: int) -> None:
    """One thing that a router, an executor or time may bring."""
    lease_id = 1000 * (1 + len(bench.truths)) + number
    instances, some = range(len(bench.config.instance_blocks)), list(bench.truths)
    match rng.randrange(14):
        case 0:
            bench.tell(Cancel(rng.choice(some)))
        case 1 | 2:
            bench.asked.add(lease_id)
            ttl_s = rng.choice([0.0, 0.5, 100.0])
            bench.tell(Lend(lease_id, rng.choice(some), ttl_s, rng.random() < 0.5))
        case 3:
            bench.asked.add(lease_id)
            names = bench.truths[rng.choice(some)].names
            bench.tell(LendPrefix(lease_id, tuple(names), rng.choice([0.0, 0.5, 100.0])))
        case 4 | 5 if bench.loans:
            bench.tell(EndLease(rng.choice(list(bench.loans))))
        case 6:
            names = tuple(bench.truths[rng.choice(some)].names)
            digest = rng.choice([bench.config.model_digest] * 3 + ["of another model"])
            offer = bench.offers[lease_id] = KVOffer(lease_id, digest, names, ())
            bench.tell(Receive(offer, rng.choice([0.0, 0.5, 100.0])))
        case 7 | 8 if bench.pulls:
            bench.finish_pull(rng.choice(list(bench.pulls)), rng)
        case 9:
            bench.tell(DrainInstance(rng.choice(instances), rng.random() < 0.5))
        case 10:
            slow = tuple((each, 1 + 3 * rng.random()) for each in instances if rng.random() < 0.3)
            bench.tell(InstancesSlow(slow))
        case 11:
            bench.carry(rng.choice([0.0, 0.5, 1.0, 1.0]))
        case 12:
            bench.now += rng.choice([0.0, 0.1, 3.0])
        case _ if bench.compiling:
            compiled(bench, rng)


def compiled(bench: AnyBench, rng: random.Random) -> None:
    wanted = bench.compiling.pop(rng.randrange(len(bench.compiling)))
    bench.tell(GrammarStarted(wanted.request_id))
    if rng.random() < 0.1:
        error = ErrorInfo.of(InvalidRequestError("no such type", code="invalid_json_schema"))
        bench.tell(GrammarFailed(wanted.request_id, error))
    else:
        bench.tell(GrammarReady(wanted.request_id, Multiples(wanted.prefix_ids)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_stages=st.integers(1, 3),
    num_blocks=st.sampled_from([13, 24, 60]),
    prefix_caching=st.sampled_from([True, True, True, False]),
    faults=st.sampled_from([0.0, 0.03]),
)
def test_every_block_comes_back_and_every_request_ends_once(
    seed: int, num_stages: int, num_blocks: int, prefix_caching: bool, faults: float
) -> None:
    rng = random.Random(seed)
    routes = random_routes(rng, num_stages)
    num_instances = 1 + max(hop.instance for route in routes for hop in route)
    config = make_config(
        instance_blocks=tuple(num_blocks + rng.choice([-4, 0, 9]) for _ in range(num_instances)),
        max_model_len=16 * (num_blocks - 4),
        routes=routes,
        kv_kinds=tuple(rng.choice(["a"] * 8 + ["b", ""]) for _ in range(num_instances)),
        max_num_batched_tokens=rng.choice([6, 24, 100]),
        max_waiting=rng.choice([2, 1000]),
        batching=rng.choice(["even", "continuous", "article"]),
        tpot_target_s=rng.choice([None, 0.02]),
        prefix_caching=prefix_caching,
        max_steps_in_flight=rng.randrange(1, 4),
        max_step_failures=rng.choice([2, 1000]),
    )
    bench = AnyBench(config, rng)
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(80))] for _ in range(3)]
    for i in range(24):
        request = random_request(rng, i, prefixes)
        bench.know(Truth(request, bench.num_layers))
        bench.submit(request)
        for number in range(rng.randrange(12 * num_stages)):
            if rng.random() < faults / num_stages:
                fail_at_random(bench, rng)
            if bench.down and rng.random() < 0.1:
                bench.ready(rng.choice(sorted(bench.down)))
            if rng.random() < 0.25:
                something_else(bench, rng, number)
            bench.step()
    bench.ready(*bench.down)
    while bench.compiling:
        compiled(bench, rng)
    bench.run_out()
    assert set(bench.finished) == set(bench.truths), "each request ends exactly once"
    for request_id, truth in bench.truths.items():
        check_end(bench, request_id, truth)


def check_end(bench: AnyBench, request_id: str, truth: Truth) -> None:
    got, last = bench.outputs[request_id], bench.finished[request_id]
    length = bench.config.max_model_len - len(truth.request.prompt_ids)
    want = truth.output[: max(length, 0)]
    assert got == want[: len(got)]
    if last.finish == "error":
        assert last.error is not None
    elif last.finish != "cancelled":
        assert got == want
        assert last.finish == (truth.finish if want == truth.output else "length")
