"""What `shoal bench` computes from records, and the prompts it makes: no server needed."""

from __future__ import annotations

import io
import json
from random import Random

import numpy as np
import pytest
from rich.console import Console

from shoal.cli.bench_prompts import PromptSource, token_id_source
from shoal.cli.bench_report import latencies_of, meets, render, summarise
from shoal.cli.loadgen import LoadConfig, RequestRecord
from shoal.core.errors import ConfigError
from shoal.core.latency import parse_slo, percentile
from shoal.core.workload import Arrival


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_percentiles_are_numpys(size: int) -> None:
    values = sorted(Random(size).random() for _ in range(size))
    for percent in (0, 50, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def record(**changes: object) -> RequestRecord:
    """Due at 1.0, sent at 1.5 (late), pieces at 2.0, 2.1, 2.4; five tokens by usage."""
    fields: dict[str, object] = {
        "scheduled_s": 1.0,
        "sent_s": 1.5,
        "end_s": 2.5,
        "chunk_times_s": [2.0, 2.1, 2.4],
        "prompt_tokens": 7,
        "output_tokens": 5,
    }
    return RequestRecord(**{**fields, **changes})  # type: ignore[arg-type]


def test_latencies_count_from_the_scheduled_time() -> None:
    found = latencies_of(record())
    assert found is not None
    assert found.ttft_s == pytest.approx(1.0)
    assert found.e2e_s == pytest.approx(1.5)
    assert found.tpot_s == pytest.approx(0.4 / 4)
    assert found.itl_s == pytest.approx((0.1, 0.3))


def test_pieces_stand_for_tokens_without_usage() -> None:
    found = latencies_of(record(output_tokens=None))
    assert found is not None
    assert (found.output_tokens, found.tpot_s) == (3, pytest.approx(0.2))


def test_a_single_token_has_no_tpot_and_a_failure_no_latency() -> None:
    single = latencies_of(record(chunk_times_s=[2.0], output_tokens=1))
    assert single is not None
    assert single.tpot_s is None
    assert meets(single, {"ttft": 1.1, "tpot": 0.001})
    assert latencies_of(record(error="truncated")) is None
    assert not meets(None, {})


def test_slo() -> None:
    assert parse_slo("ttft=2s,tpot=50ms") == {"ttft": 2.0, "tpot": pytest.approx(0.05)}
    assert parse_slo(" e2e = 1.5 s") == {"e2e": 1.5}
    for wrong in ("", "ttft=2", "tpot=fast", "ttft=2s;tpot=1s", "itl=3ms", "ttft=-1s"):
        with pytest.raises(ConfigError, match="SLO has"):
            parse_slo(wrong)


def test_summary_counts_every_request_once() -> None:
    records = [
        record(),
        record(chunk_times_s=[3.0, 3.5], output_tokens=2, end_s=4.0, waited_for_slot=True),
        record(error="refused", status=429, message="full", end_s=1.6),
        record(error="http", status=500, message="boom", end_s=1.6),
        record(error="http", status=500, message="bang", end_s=1.6),
    ]
    summary = summarise(records, num_planned=9, slo={"ttft": 1.5})
    assert summary["requests"] == {
        "planned": 9,
        "finished": 5,
        "succeeded": 2,
        "refused": 1,
        "failed": 2,
    }
    assert summary["errors"] == {
        "http_500": {"count": 2, "example": "boom"},
        "refused": {"count": 1, "example": "full"},
    }
    assert summary["duration_s"] == 4.0
    assert summary["tokens"] == {"prompt": 14, "output": 7, "counted_by": "usage"}
    assert summary["throughput"]["output_tokens_per_s"] == pytest.approx(7 / 4)
    assert summary["goodput"]["share"] == pytest.approx(1 / 5)
    assert summary["goodput"]["requests_per_s"] == pytest.approx(1 / 4)
    assert summary["latency_s"]["ttft"]["mean"] == pytest.approx(1.5)
    assert summary["latency_s"]["itl"]["max"] == pytest.approx(0.5)
    assert summary["delayed_by_concurrency_limit"] == 1
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize("records", [[], [record(error="connection", message="[Errno 111]")]])
def test_a_report_without_a_success_can_be_read(records: list[RequestRecord]) -> None:
    summary = summarise(records, num_planned=3, slo={"ttft": 1.0})
    assert summary["latency_s"]["ttft"] is None
    stream = io.StringIO()
    report = {"url": "u", "model": "m", "workload": "w", "notes": ["a note"], **summary}
    Console(file=stream, width=120).print(render(report))
    assert "0 of 3 requests" in stream.getvalue()
    assert "a note" in stream.getvalue()
    assert ("[Errno 111]" in stream.getvalue()) == bool(records)


def arrival(tokens: int, hashes: tuple[int, ...] = ()) -> Arrival:
    return Arrival(arrival_s=0, prompt_tokens=tokens, output_tokens=1, block_hashes=hashes)


def test_token_id_prompts_have_the_length_and_stay_in_range() -> None:
    source = token_id_source(50_000)
    prompt = source.prompt(arrival(777), "seed")
    assert len(prompt) == 777
    assert all(isinstance(unit, int) and 1000 <= unit < 37_500 for unit in prompt)
    assert prompt == source.prompt(arrival(777), "seed") != source.prompt(arrival(777), "other")
    assert token_id_source(8).prompt(arrival(3), "s")


def test_prompts_with_the_same_hashes_share_their_beginning() -> None:
    source = token_id_source(50_000)
    one = source.prompt(arrival(1100, (4, 5, 6)), "one")
    two = source.prompt(arrival(1600, (4, 5, 7, 8)), "two")
    assert one[:1024] == two[:1024]
    assert one[1024:] != two[1024:1100]
    assert (len(one), len(two)) == (1100, 1600)


def test_word_prompts() -> None:
    source = PromptSource(["a", "b"], overhead_tokens=2)
    prompt = source.prompt(arrival(12), "s")
    assert isinstance(prompt, str)
    assert len(prompt.split(" ")) == 10
    assert source.prompt(arrival(1), "s") in ("a", "b")
    given = Arrival(arrival_s=0, prompt_tokens=0, output_tokens=1, prompt="Why?")
    assert source.prompt(given, "s") == "Why?"


def test_bodies() -> None:
    completion = LoadConfig(model="m").body([1, 2], 5)
    assert completion["prompt"] == [1, 2]
    assert (completion["max_tokens"], completion["ignore_eos"]) == (5, True)
    chat = LoadConfig(model="m", chat=True, ignore_eos=False).body("hi", 5)
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert "prompt" not in chat
    assert "ignore_eos" not in chat
