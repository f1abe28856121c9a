"""A router and two engines whose KV says what it is of: requests move, and nothing shows.

The engines are laid out differently: both layers on one instance, or one on each of two.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from chain_worker import expected_output
from engine_bench import VOCAB, Bench, make_config, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.kv import KVArrived, KVOffer, KVPull
from shoal.core.plan import Hop, Role
from shoal.core.request import GenerateRequest, Output
from shoal.core.split import Range
from shoal.core.stats import EngineInfo
from shoal.core.step import BLOCK_SIZE
from shoal.engine.config import EngineConfig
from shoal.engine.events import (
    Cancel,
    DropKV,
    Emit,
    EndLease,
    EndLoan,
    Lend,
    LendKV,
    PullKV,
    Receive,
    TellPulled,
)
from shoal.router.events import (
    CancelAt,
    Deliver,
    DrainReplica,
    EndLeaseAt,
    Event,
    KVLent,
    KVPulled,
    LendAt,
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
)
TIMEOUT_S = 1.0


class Replica(Bench):
    """An engine that says what it wants done about KV."""

    def __init__(self, name: str, fleet: Fleet, config: EngineConfig) -> None:
        self.name, self.fleet = name, fleet
        self.lent: dict[int, LendKV] = {}
        self.pulls: dict[int, KVPull] = {}
        super().__init__(config)

    def _carry_out(self, effect: object) -> None:
        fleet = self.fleet
        match effect:
            case LendKV(loan, names):
                if names:
                    self.lent[loan.lease_id] = effect
                offer = KVOffer(loan.lease_id, self.config.model_digest, names, ())
                fleet.later(self.name, KVLent(self.name, fleet.incarnations[self.name], offer))
            case EndLoan(lease_id):
                del self.lent[lease_id]
            case PullKV(pull):
                self.pulls[pull.pull_id] = pull
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
        for hop in self.lent[lease_id].loan.hops:
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
        self.digest = "same"
        self.state = RouterState(
            RouterConfig(
                replicas=tuple(LAYOUTS),
                max_attempts=1000,
                roles=self.roles,
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
                case LendAt(name, move_id, request_id, ttl_s):
                    if name in self.replicas:
                        self.replicas[name].tell(Lend(move_id, request_id, ttl_s))
                case PullAt(name, offer, ttl_s):
                    if name in self.replicas:
                        self.replicas[name].tell(Receive(offer, ttl_s))
                case EndLeaseAt(name, move_id):
                    if name in self.replicas:
                        self.replicas[name].tell(EndLease(move_id))
        self.state.check_integrity()

    def carry(self, name: str, *, all_of_it: bool) -> None:
        """A pull ends: what came is written, and of the rest something that is wrong."""
        replica = self.replicas[name]
        for pull in list(replica.pulls.values()):
            if pull.pull_id not in replica.pulls:
                continue  # it ran out of time with the one before
            lenders = [r for r in self.replicas.values() if pull.lease_id in r.lent]
            wanted = len(pull.hops[0].block_ids)
            num = wanted if all_of_it else self.rng.randrange(wanted + 1)
            for hop in pull.hops:
                for layer in range(hop.layers.start, hop.layers.stop):
                    for index, block in enumerate(hop.block_ids):
                        if lenders and index < num:
                            got = lenders[0].read(pull.lease_id, pull.first + index, layer)
                        else:
                            got = [self.rng.randrange(9)] * BLOCK_SIZE, {}
                        replica.write(block, layer, *got)
            num = num if lenders else 0
            self.num_moved_blocks += num
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
    begin = [rng.randrange(1, VOCAB) for _ in range(40)]
    return {
        f"q{i}": make_request(
            f"q{i}",
            [*begin[: rng.randrange(40)], *(rng.randrange(1, VOCAB) for _ in range(1 + i))],
            max_tokens=rng.randrange(1, 60),
            seed=i,
        )
        for i in range(count)
    }


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_on_the_way_the_tokens_are_the_same(seed: int) -> None:
    rng = random.Random(seed)
    fleet = Fleet(rng)
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
        replica.now = fleet.now + 100.0
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
