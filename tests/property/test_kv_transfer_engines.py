"""A router and two engines whose KV says what it is of: requests move, and nothing shows.

The engines are laid out differently: both layers on one instance, or one on each of two.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from chain_worker import expected_output
from engine_bench import VOCAB, Bench, make_config, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.kv import KVArrived, KVLoan, KVOffer, KVPull
from shoal.core.plan import Hop, Role
from shoal.core.request import GenerateRequest, Grammar, Output, SamplingParams
from shoal.core.split import Range
from shoal.core.stats import EngineInfo
from shoal.core.step import BLOCK_SIZE
from shoal.engine.blocks import block_name, root_name
from shoal.engine.config import EngineConfig
from shoal.engine.events import (
    Cancel,
    DropKV,
    Emit,
    EndLease,
    EndLoan,
    GrowLoan,
    Lend,
    LendKV,
    LendPrefix,
    PullKV,
    Receive,
    StopKV,
    TellPulled,
)
from shoal.engine.events import Submit as EngineSubmit
from shoal.router import prefixes
from shoal.router.events import Cancel as RouterCancel
from shoal.router.events import (
    CancelAt,
    Deliver,
    DrainReplica,
    EndLeaseAt,
    Event,
    KVLent,
    KVPulled,
    LendAt,
    LendPrefixAt,
    PullAt,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    ResumeReplica,
    Send,
    Submit,
    Tick,
)
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState

LAYOUTS: dict[str, dict[str, object]] = {
    "a": {"instance_blocks": (30,), "routes": ((Hop(0, Range(0, 2)),),)},
    "b": {
        "instance_blocks": (30, 24),
        "routes": ((Hop(0, Range(0, 1)), Hop(1, Range(1, 2))),),
    },
}
INFO = EngineInfo(
    max_model_len=200,
    num_kv_blocks=24,
    max_num_seqs=6,
    max_num_batched_tokens=24,
    max_waiting=10_000,
    device="test",
    dtype="none",
    kv_digest="same",
    kv_block_bytes=1000,
)
TIMEOUT_S = 1.0


@pytest.fixture(autouse=True, scope="module")
def short_prompts_count() -> Iterator[None]:
    """As those of these tests are: what is seen of them says how fast a replica is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefixes, "_FEWEST_TOKENS", 20)
        yield


class Replica(Bench):
    """An engine that says what it wants done about KV."""

    def __init__(self, name: str, fleet: Fleet, config: EngineConfig) -> None:
        self.name, self.fleet = name, fleet
        self.lent: dict[int, KVLoan] = {}
        self.pulls: dict[int, KVPull] = {}
        self.num_written: dict[int, int] = {}
        super().__init__(config)

    def _carry_out(self, effect: object) -> None:
        fleet = self.fleet
        match effect:
            case LendKV(loan, names):
                if names:
                    self.lent[loan.lease_id] = loan
                offer = KVOffer(loan.lease_id, self.config.model_digest, names, ())
                fleet.later(self.name, KVLent(self.name, fleet.incarnations[self.name], offer))
            case GrowLoan(loan):
                assert loan.num_ready >= self.lent[loan.lease_id].num_ready
                self.lent[loan.lease_id] = loan
            case EndLoan(lease_id):
                del self.lent[lease_id]
            case PullKV(pull):
                self.pulls[pull.pull_id] = pull
                self.num_written[pull.pull_id] = 0
            case StopKV(pull_id):
                if fleet.rng.random() < 0.5:  # otherwise its workers hang
                    fleet.stopped.append((self.name, pull_id))
            case DropKV(pull_id):
                self.pulls.pop(pull_id, None)
            case TellPulled(pull_id, num):
                news = KVPulled(self.name, fleet.incarnations[self.name], pull_id, num)
                fleet.later(self.name, news)
            case Emit(output):
                super()._carry_out(effect)
                fleet.later(
                    self.name,
                    ReplicaOutputs(self.name, fleet.incarnations[self.name], [output]),
                )
            case _:
                super()._carry_out(effect)

    def write(self, block: int, layer: int, found: list[int], before: dict[int, object]) -> None:
        """KV of one layer of a block, from elsewhere."""
        for hop in self.config.routes[0]:
            if layer in hop.layers:
                instance = self.workers.instances[hop.instance]
                instance._before.update(before)  # type: ignore[arg-type]
                for offset, value in enumerate(found):
                    instance._slots[block * BLOCK_SIZE + offset, layer] = value

    def read(self, lease_id: int, index: int, layer: int) -> tuple[list[int], dict[int, object]]:
        for hop in self.lent[lease_id].hops:
            if layer in hop.layers:
                instance, block = self.workers.instances[hop.instance], hop.block_ids[index]
                slots = range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
                found = [instance._slots[slot, layer] for slot in slots]
                return found, dict(instance._before)
        raise AssertionError(f"layer {layer} is not lent")


@dataclass
class Fleet:
    """The router, its replicas, and what is on its way between them."""

    rng: random.Random
    roles: dict[str, Role] = field(default_factory=dict)
    num_moved_blocks: int = 0
    now: float = 0.0

    def __post_init__(self) -> None:
        self.stopped: list[tuple[str, int]] = []
        self.num_prefixes = 0
        self.state = RouterState(
            RouterConfig(
                replicas=tuple(LAYOUTS),
                max_lost=1000,
                roles=self.roles,
                policy="least-outstanding",
                moves_kv=True,
                move_timeout_s=TIMEOUT_S,
                balance_gap=3,
            ),
            self.rng,
        )
        self.incarnations = dict.fromkeys(LAYOUTS, -1)
        self.replicas: dict[str, Replica] = {}
        self.news: dict[str, list[Event]] = {name: [] for name in LAYOUTS}
        self.delivered: dict[str, list[int]] = {}
        self.finished: dict[str, Output] = {}

    def up(self, name: str, digest: str = "same") -> None:
        while self.news[name]:  # its client starts it again after it said that it was gone
            self.tell(self.news[name].pop(0))
        self.incarnations[name] += 1
        config = make_config(model_digest=digest, **LAYOUTS[name])
        self.replicas[name] = Replica(name, self, config)
        self.news[name].append(ReplicaReady(name, self.incarnations[name], INFO))

    def down(self, name: str) -> None:
        """It dies; what it said last may still come."""
        del self.replicas[name]
        self.news[name].append(ReplicaLost(name, self.incarnations[name], "killed"))

    def later(self, name: str, event: Event) -> None:
        self.news[name].append(event)

    def tell(self, event: Event) -> None:
        for effect in self.state.handle(event, self.now):
            match effect:
                case Deliver(outputs):
                    for output in outputs:
                        assert output.request_id not in self.finished
                        self.delivered.setdefault(output.request_id, []).extend(output.token_ids)
                        if output.finish is not None:
                            self.finished[output.request_id] = output
                case Send(name, request):
                    if name in self.replicas:
                        self.replicas[name].submit(request)
                case CancelAt(name, request_id):
                    if name in self.replicas:
                        self.replicas[name].tell(Cancel(request_id))
                case LendAt(name, move_id, request_id, ttl_s, ahead):
                    if name in self.replicas:
                        self.replicas[name].tell(Lend(move_id, request_id, ttl_s, ahead))
                case LendPrefixAt(name, move_id, names, ttl_s):
                    self.num_prefixes += 1
                    if name in self.replicas:
                        self.replicas[name].tell(LendPrefix(move_id, names, ttl_s))
                case PullAt(name, offer, ttl_s):
                    if name in self.replicas:
                        self.replicas[name].tell(Receive(offer, ttl_s))
                case EndLeaseAt(name, move_id):
                    if name in self.replicas:
                        self.replicas[name].tell(EndLease(move_id))
        self.state.check_integrity()

    def carry(self, name: str, *, all_of_it: bool) -> None:
        """Pulls go on with what is ready; some end, and what did not come is something wrong."""
        replica = self.replicas[name]
        for pull_id, pull in list(replica.pulls.items()):
            if pull_id not in replica.pulls:
                continue  # dropped at the end of one before it
            lender = next((r for r in self.replicas.values() if pull.lease_id in r.lent), None)
            wanted, done = len(pull.hops[0].block_ids), replica.num_written[pull_id]
            stop = done
            if lender is not None:
                loan = lender.lent[pull.lease_id]
                stop = min(wanted, max(loan.num_ready - pull.first, 0))
                stop = stop if all_of_it else self.rng.randint(done, max(done, stop))
                for index in range(done, stop):
                    self.copy(replica, pull, lender, index)
                self.num_moved_blocks += stop - done
                replica.num_written[pull_id] = stop
            comes = lender is not None and len(loan.hops[0].block_ids) - pull.first > stop
            is_over = stop == wanted or not comes or (name, pull_id) in self.stopped
            if is_over or (not all_of_it and self.rng.random() < 0.5):
                self.end_pull(replica, pull)

    def copy(self, replica: Replica, pull: KVPull, lender: Replica, index: int) -> None:
        for hop in pull.hops:
            for layer in range(hop.layers.start, hop.layers.stop):
                got = lender.read(pull.lease_id, pull.first + index, layer)
                replica.write(hop.block_ids[index], layer, *got)

    def end_pull(self, replica: Replica, pull: KVPull) -> None:
        num = replica.num_written[pull.pull_id]
        for hop in pull.hops:
            for layer in range(hop.layers.start, hop.layers.stop):
                for block in hop.block_ids[num:]:
                    replica.write(block, layer, [self.rng.randrange(9)] * BLOCK_SIZE, {})
        del replica.pulls[pull.pull_id]
        replica.tell(KVArrived(pull.pull_id, (num,) * len(pull.hops)))

    def some_news(self) -> None:
        waiting = [name for name, news in self.news.items() if news]
        if waiting:
            self.tell(self.news[self.rng.choice(waiting)].pop(0))

    def run_out(self) -> None:
        for _ in range(20_000):
            if not self.state.num_in_flight:
                return
            self.now += 0.01
            for name, replica in self.replicas.items():
                replica.now = self.now
                replica.step()
                self.carry(name, all_of_it=True)
            for name in LAYOUTS:
                while self.news[name]:
                    self.tell(self.news[name].pop(0))
            self.tell(Tick())
        raise AssertionError("requests are left")


def requests(rng: random.Random, count: int) -> dict[str, GenerateRequest]:
    begin = [rng.randrange(1, VOCAB) for _ in range(80)]
    return {
        f"q{i}": make_request(
            f"q{i}",
            [
                *begin[: rng.choice((0, 20, 40, 80))],
                *(rng.randrange(1, VOCAB) for _ in range(1 + i)),
            ],
            max_tokens=rng.randrange(1, 60),
            seed=i,
        )
        for i in range(count)
    }


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_on_the_way_the_tokens_are_the_same(seed: int) -> None:
    rng = random.Random(seed)
    fleet = Fleet(rng, roles=rng.choice(({}, {"b": "prefill", "a": "decode"})))
    for name in LAYOUTS:
        fleet.up(name)
    asked = requests(rng, 20)
    for request in asked.values():
        fleet.tell(Submit(request))
        for _ in range(rng.randrange(40)):
            fleet.now += rng.choice((0.0, 0.01, 0.3))
            name = rng.choice(list(LAYOUTS))
            if rng.random() < 0.02:
                fleet.down(name) if name in fleet.replicas else fleet.up(name)
            if rng.random() < 0.05:
                drain = rng.random() < 0.5
                fleet.tell(DrainReplica(name) if drain else ResumeReplica(name))
            if name in fleet.replicas:
                replica = fleet.replicas[name]
                replica.now = fleet.now
                if rng.random() < 0.02:
                    replica.fail()  # nobody is to blame, so no request ends by it
                elif rng.random() < 0.2:
                    fleet.carry(name, all_of_it=False)
                else:
                    replica.step()
            fleet.some_news()
            fleet.tell(Tick())
    for name in LAYOUTS:
        if name not in fleet.replicas:
            fleet.up(name)
    fleet.run_out()
    for request_id, request in asked.items():
        limit = request.sampling.max_tokens or 0
        assert fleet.finished[request_id].error is None
        want = expected_output(request.prompt_ids, limit, VOCAB, request.sampling.seed, 2)
        assert fleet.delivered[request_id] == want
    for replica in fleet.replicas.values():
        for seconds in (100.0, 200.0):  # pulls are stopped, and then dropped if they hang
            replica.now = fleet.now + seconds
            replica.tell()
        replica.run_out()  # which checks that every block is free: no lease outlives its time
        assert not replica.lent
        assert not replica.pulls


@pytest.mark.parametrize("digest", ["same", "another"])
def test_kv_goes_along_where_it_means_the_same(digest: str) -> None:
    fleet = Fleet(random.Random(1))
    fleet.up("a")
    fleet.up("b", digest)
    request = make_request("q", list(range(1, 41)), max_tokens=60, seed=3)
    want = expected_output(request.prompt_ids, 60, VOCAB, 3, 2)
    assert len(want) > 12, "it must run for a while, or there is nothing to move"
    for name in LAYOUTS:
        fleet.tell(fleet.news[name].pop(0))
    fleet.tell(Submit(request))
    while len(fleet.delivered.get("q", ())) < 10:
        fleet.replicas["a"].step()
        fleet.some_news()
    fleet.tell(DrainReplica("a"))
    fleet.run_out()
    assert fleet.delivered["q"] == want
    # 49 tokens and their KV, or nothing of it.
    assert fleet.num_moved_blocks == (3 if digest == "same" else 0)
    first, second = (r.workers.instances[-1].num_tokens for r in fleet.replicas.values())
    assert second < len(want) if digest == "same" else second >= 40
    assert first >= 40


def test_a_lease_that_nobody_ends_frees_itself() -> None:
    fleet = Fleet(random.Random(1))
    fleet.up("a")
    replica = fleet.replicas["a"]
    replica.submit(make_request("q", list(range(1, 41)), max_tokens=4, seed=3))
    replica.step()
    replica.step()
    replica.step()
    replica.tell(Lend(7, "q", 5.0))
    replica.tell(Cancel("q"))
    while replica.in_flight:
        replica.step()
    assert replica.lent
    assert replica.state.stats().num_blocks_used == 2
    deadline = replica.state.next_deadline()
    assert deadline is not None
    replica.now = deadline
    replica.tell()
    assert not replica.lent
    assert replica.state.stats().num_blocks_used == 0


def test_who_asks_ahead_hears_when_nothing_comes_in_time() -> None:
    fleet = Fleet(random.Random(1))
    fleet.up("a")
    replica = fleet.replicas["a"]
    sampling = SamplingParams(max_tokens=4, grammar=Grammar(kind="json_object"))
    waiting = GenerateRequest(request_id="q", prompt_ids=(1, 2, 3), sampling=sampling)
    replica.submit(waiting)  # its grammar is never compiled
    replica.tell(Lend(7, "q", 5.0, ahead=True))
    assert replica.state.next_deadline() == 5.0
    fleet.news["a"].clear()
    replica.now = 5.0
    replica.tell()
    (answer,) = fleet.news["a"]
    assert answer == KVLent("a", 0, KVOffer(7, replica.config.model_digest, (), ()))
    assert replica.state.next_deadline() is None


def test_what_one_replica_began_another_goes_on_with() -> None:
    fleet = Fleet(random.Random(1), roles={"b": "prefill", "a": "decode"})
    for name in LAYOUTS:
        fleet.up(name)
        fleet.tell(fleet.news[name].pop(0))
    request = make_request("q", list(range(1, 41)), max_tokens=60, seed=3)
    want = expected_output(request.prompt_ids, 60, VOCAB, 3, 2)
    fleet.tell(Submit(request))
    assert fleet.state.outstanding() == {"a": 0, "b": 1}
    fleet.run_out()
    assert fleet.delivered["q"] == want
    assert fleet.num_moved_blocks == 2
    decoded = fleet.replicas["a"].workers.instances[0].num_tokens
    assert len(want) - 4 <= decoded < len(want) + BLOCK_SIZE


def test_a_prompt_is_sent_on_while_it_is_computed() -> None:
    fleet = Fleet(random.Random(1), roles={"b": "prefill", "a": "decode"})
    for name in LAYOUTS:
        fleet.up(name)
        fleet.tell(fleet.news[name].pop(0))
    request = make_request("q", [i % 7 + 1 for i in range(150)], max_tokens=30, seed=3)
    want = expected_output(request.prompt_ids, 30, VOCAB, 3, 2)
    fleet.tell(Submit(request))
    moved_by_step = []
    while not fleet.delivered.get("q"):
        fleet.replicas["b"].step()
        for name in LAYOUTS:
            while fleet.news[name]:
                fleet.tell(fleet.news[name].pop(0))
        fleet.carry("a", all_of_it=True)
        moved_by_step.append(fleet.num_moved_blocks)
    assert moved_by_step[-2] >= 6, "chunks of 24 tokens: all but the last were there before"
    assert moved_by_step[-1] == 150 // BLOCK_SIZE
    fleet.run_out()
    assert fleet.delivered["q"] == want
    assert fleet.num_moved_blocks == 150 // BLOCK_SIZE, "nothing was sent twice"
    assert fleet.replicas["a"].workers.instances[0].num_tokens < len(want) + BLOCK_SIZE


def test_a_push_that_ends_early_is_tried_once_more_when_the_prompt_is_done() -> None:
    fleet = Fleet(random.Random(1), roles={"b": "prefill", "a": "decode"})
    for name in LAYOUTS:
        fleet.up(name)
        fleet.tell(fleet.news[name].pop(0))
    request = make_request("q", [i % 7 + 1 for i in range(150)], max_tokens=30, seed=3)
    fleet.tell(Submit(request))
    fleet.replicas["b"].step()
    while fleet.news["b"]:
        fleet.tell(fleet.news["b"].pop(0))
    (pull,) = fleet.replicas["a"].pulls.values()
    fleet.carry("a", all_of_it=True)
    early = fleet.num_moved_blocks
    assert 0 < early < 150 // BLOCK_SIZE
    fleet.end_pull(fleet.replicas["a"], pull)
    fleet.tell(fleet.news["a"].pop(0))
    assert not fleet.replicas["b"].lent
    for _ in range(5):
        fleet.tell(Tick())
    assert not fleet.replicas["b"].lent, "it would fail again"
    fleet.run_out()
    assert fleet.delivered["q"] == expected_output(request.prompt_ids, 30, VOCAB, 3, 2)
    assert fleet.num_moved_blocks >= 150 // BLOCK_SIZE, "the rest came with the first token"


def test_a_prompt_that_is_given_up_half_way_is_sent_on_no_further() -> None:
    fleet = Fleet(random.Random(1), roles={"b": "prefill", "a": "decode"})
    for name in LAYOUTS:
        fleet.up(name)
        fleet.tell(fleet.news[name].pop(0))
    fleet.tell(Submit(make_request("q", [i % 7 + 1 for i in range(150)], max_tokens=30)))
    for _ in range(3):
        fleet.replicas["b"].step()
        for name in LAYOUTS:
            while fleet.news[name]:
                fleet.tell(fleet.news[name].pop(0))
        fleet.carry("a", all_of_it=True)
    moved = fleet.num_moved_blocks
    assert 0 < moved < 150 // BLOCK_SIZE
    fleet.tell(RouterCancel("q"))
    fleet.run_out()
    for replica in fleet.replicas.values():
        fleet.carry(replica.name, all_of_it=True)
        replica.run_out()
        assert not replica.lent
        assert not replica.pulls
    assert fleet.num_moved_blocks == moved


def fleet_where_a_has_computed(prompt: list[int]) -> Fleet:
    """And is at work, so that what comes next goes to the other replica."""
    fleet = Fleet(random.Random(1))
    for name in LAYOUTS:
        fleet.up(name)
        fleet.tell(fleet.news[name].pop(0))
    for index, name in enumerate(LAYOUTS):  # each learns how long a prompt takes it
        other = [(i + index) % 11 + 5 for i in range(30)] if name == "b" else prompt
        request = make_request(f"first {name}", other, max_tokens=1)
        fleet.tell(Submit(request))
        if name == "a":
            fleet.run_out()
            alike = [*prompt[:64], 9, 9, 9]
            fleet.tell(Submit(make_request("at work", alike, max_tokens=40, seed=1)))
    while "first b" not in fleet.finished:
        fleet.replicas["b"].now = fleet.now = fleet.now + 0.01
        fleet.replicas["b"].step()
        while fleet.news["b"]:
            fleet.tell(fleet.news["b"].pop(0))
    return fleet


def test_a_prefix_that_another_replica_has_is_got_instead_of_computed() -> None:
    prompt = [i % 7 + 1 for i in range(100)]
    fleet = fleet_where_a_has_computed(prompt)
    request = make_request("q", [*prompt[:96], 3, 4, 5], max_tokens=10, seed=3)
    before = fleet.replicas["b"].workers.instances[0].num_tokens
    fleet.tell(Submit(request))
    assert fleet.state.outstanding() == {"a": 1, "b": 1}
    assert not fleet.replicas["b"].in_flight, "it waits"
    fleet.run_out()
    want = expected_output(request.prompt_ids, 10, VOCAB, 3, 2)
    assert fleet.delivered["q"] == want
    assert fleet.num_moved_blocks == 6
    assert fleet.replicas["b"].workers.instances[0].num_tokens - before <= 3 + len(want)


@pytest.mark.parametrize("what", ["lender dies", "lender forgot", "nothing comes"])
def test_a_prefix_is_waited_for_no_longer_than_computing_it_takes(what: str) -> None:
    prompt = [i % 7 + 1 for i in range(100)]
    fleet = fleet_where_a_has_computed(prompt)
    request = make_request("q", [*prompt[:96], 3, 4, 5], max_tokens=10, seed=3)
    if what == "lender forgot":
        (pool,) = fleet.replicas["a"].state._scheduler.pools.of_instance
        pool.forget(range(pool.num_blocks))
    fleet.tell(Submit(request))
    assert fleet.num_prefixes == 1
    assert "q" not in fleet.replicas["b"].outputs
    if what == "lender dies":
        fleet.down("a")
    elif what == "nothing comes":
        fleet.now += 100 * (fleet.state._replicas["b"].token_s or 0)
        fleet.tell(Tick())
    while fleet.news["a"] and what != "nothing comes":
        fleet.tell(fleet.news["a"].pop(0))
    assert "q" in fleet.replicas["b"].outputs
    if what == "lender dies":
        fleet.up("a")
    fleet.run_out()
    assert fleet.delivered["q"] == expected_output(request.prompt_ids, 10, VOCAB, 3, 2)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_somebody_else_still_computes_is_not_lent(ahead: bool) -> None:
    fleet = Fleet(random.Random(1))
    fleet.up("a")
    replica = fleet.replicas["a"]
    prompt = [i % 7 + 1 for i in range(20)]
    requests = (make_request(name, [*prompt, 1, 2], seed=3) for name in ("first", "second"))
    replica.tell(*map(EngineSubmit, requests))
    assert replica.state.stats().num_running == 2, "the second one begins behind the first's block"
    replica.tell(Lend(7, "second", 5.0, ahead))
    assert 7 not in replica.lent or replica.lent[7].num_ready == 0
    names = root_and_first_block(replica, prompt)
    replica.tell(LendPrefix(8, names, 5.0))
    assert 8 not in replica.lent
    replica.step()
    replica.tell(LendPrefix(9, names, 5.0))
    assert replica.lent[9].num_ready == 1


def root_and_first_block(replica: Replica, prompt: list[int]) -> tuple[bytes, ...]:
    root = root_name(replica.config.model_digest, "")
    return (block_name(root, prompt[:BLOCK_SIZE]),)
