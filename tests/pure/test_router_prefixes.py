"""What a router remembers of its replicas' KV, and when it has a request wait for some."""

from __future__ import annotations

import dataclasses

import pytest

from shoal.core.request import GenerateRequest, SamplingParams
from shoal.core.stats import EngineInfo
from shoal.policy.waiting import Waiting, bandwidth, updated
from shoal.router.prefixes import Prefix, Prefixes
from shoal.router.records import Attempt, Entry, Move, Replica

INFO = EngineInfo(
    max_model_len=1000,
    num_kv_blocks=10,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_waiting=8,
    device="test",
    dtype="none",
    kv_digest="same",
    kv_block_bytes=100_000,
)
PROMPT = tuple(range(1, 101))


def entry(prompt: tuple[int, ...] = PROMPT, salt: str = "") -> Entry:
    request = GenerateRequest(
        request_id="q", prompt_ids=prompt, sampling=SamplingParams(), salt=salt
    )
    return Entry(request, None, [])


def two_replicas(**fields: object) -> tuple[Prefixes, Replica, Replica]:
    """The first one has computed PROMPT."""
    one, other = Replica("one", info=INFO), Replica("other", info=INFO, token_s=0.001)
    other.info = dataclasses.replace(INFO, **fields)  # type: ignore[arg-type]
    prefixes = Prefixes(is_on=True)
    prefixes.note(one, entry())
    return prefixes, one, other


@pytest.mark.parametrize(
    ("token_s", "bytes_per_s", "pays"),
    [
        (1e-3, 1e9, True),  # 0.16 s to compute, 0.01 to get
        (1e-4, 1e9, False),  # a round trip takes as long as computing
        (1e-3, 10e6, False),  # 0.11 s to get
        (1e-3, 20e6, True),
    ],
)
def test_kv_is_waited_for_where_computing_takes_twice_as_long(
    token_s: float, bytes_per_s: float, pays: bool
) -> None:
    waiting = Waiting(
        num_blocks=10, block_bytes=100_000, bandwidth_bytes_per_s=bytes_per_s, token_s=token_s
    )
    assert waiting.pays == pays
    assert waiting.computing_s == pytest.approx(160 * token_s)


def test_what_is_seen_counts_more_and_more() -> None:
    assert updated(None, 3.0) == 3.0
    found = 3.0
    for _ in range(20):
        found = updated(found, 5.0)
    assert 4.9 < found < 5.0
    assert bandwidth(1000, 1.01) == pytest.approx(1000)
    assert bandwidth(1000, 0.0) == pytest.approx(1e6)


def test_a_prefix_is_got_from_who_has_it() -> None:
    prefixes, one, other = two_replicas()
    longer = entry((*PROMPT[:96], 7, 8, 9))
    found = prefixes.worth_getting(longer, other, [one, other])
    assert isinstance(found, Prefix)
    assert (found.source, len(found.names)) == ("one", 6)
    assert found.patience_s == pytest.approx(96 * 0.001)
    assert prefixes.held(one, longer) == 6
    assert prefixes.held(other, longer) == 0
    # The last token is computed in any case.
    whole = prefixes.worth_getting(entry(PROMPT[:96]), other, [one, other])
    assert whole is not None
    assert len(whole.names) == 5


@pytest.mark.parametrize(
    "why", ["another tenant", "another digest", "it stays", "its own", "logprobs", "gone", "off"]
)
def test_and_from_nobody_else(why: str) -> None:
    fields = {"another digest": {"kv_digest": "other"}, "it stays": {"kv_block_bytes": 0}}
    prefixes, one, other = two_replicas(**fields.get(why, {}))
    asked = entry(salt="tenant" if why == "another tenant" else "")
    match why:
        case "its own":
            prefixes.note(other, entry())
        case "logprobs":
            sampling = SamplingParams(prompt_logprobs=1)
            asked = Entry(dataclasses.replace(asked.request, sampling=sampling), None, [])
        case "gone":
            prefixes.forget("one")
        case "off":
            prefixes = Prefixes(is_on=False)
            prefixes.note(one, entry())
    assert prefixes.worth_getting(asked, other, [one, other]) is None


def test_no_more_is_remembered_than_there_is_room_for() -> None:
    prefixes, one, _other = two_replicas()
    later = entry(tuple(range(200, 300)))
    prefixes.note(one, later)
    assert prefixes.held(one, later) == 6
    assert prefixes.held(one, entry()) == 4, "10 blocks in all: the tail went"
    prefixes.lacks("one", entry_names(prefixes, one, later)[2:])
    assert prefixes.held(one, later) == 2


def entry_names(prefixes: Prefixes, replica: Replica, asked: Entry) -> list[bytes]:
    prefixes.held(replica, asked)
    return asked.names


def test_a_slow_link_is_learned_from_one_pull_that_ran_out_of_time() -> None:
    prefixes, one, other = two_replicas()
    asked = entry()
    assert prefixes.worth_getting(asked, other, [one, other]) is not None
    move = Move(1, "q", "one", "other", 5.1, "prefix", pulled_s=5.0, num_offered=6)
    prefixes.note_got(asked, move, other, 2, 5.05)
    assert prefixes.worth_getting(asked, other, [one, other]) is not None, "there was no room"
    prefixes.note_got(asked, move, other, 2, 5.1)
    assert prefixes.worth_getting(asked, other, [one, other]) is None
    prefixes.forget("one")
    prefixes.note(one, asked)
    assert prefixes.worth_getting(asked, other, [one, other]) is not None


def test_how_fast_a_replica_is_shows_where_it_had_nothing_else_to_do() -> None:
    prefixes, _one, other = two_replicas()
    other.token_s = None
    asked = entry()
    attempt = Attempt("other", "q", sent_s=2.0, was_alone=True)
    other.outstanding = {"q": None, "another": None}
    prefixes.note_computed(other, asked, attempt, 0, 3.0)
    assert other.token_s is None
    other.outstanding = {"q": None}
    prefixes.note_computed(other, asked, attempt, 80, 3.0)
    assert other.token_s is None, "20 tokens say little"
    prefixes.note_computed(other, asked, attempt, 0, 3.0)
    assert other.token_s == pytest.approx(0.01)
