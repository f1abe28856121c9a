"""What replicas that stall, die, are cut off or slow down cost their users, live in a lab.

Each scenario does it to workers of lab replicas of a real model while they serve, and returns
numbers with a verdict. Workers are stopped, resumed and killed by their process ids: a command of
its own takes too long for that. Knows nothing of tables.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import httpx
from lab_session import Session
from streams import Ask, Told, at_times, client, served_model, told
from tails_live import (
    EQUAL,
    HOSTS,
    LINKS,
    UNEQUAL,
    ask_of,
    base_of,
    counters,
    lab_up,
    load_of,
    one_by_one,
    percent_of,
    say,
    turned,
    whole,
)
from tails_record import longest_gap

STALL_S, STRIKE_EVERY_S, DOWN_S = 2.0, 15.0, 8.0
SLOWED_TO, WINDOW_S = 0.2, 0.5
_PIPELINES = (("a", "b"), ("c", "d"), ("e", "f"))
"""Hosts of the two stages of each replica: what joins them can be cut."""


# --- 2: stalls ---


def stalls(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """A replica that does nothing for 2 s, now and then, with hedging and without."""
    rng = Random(4)
    lengths = load_of(args, args.requests).at_rate(args.rate).requests
    asks = [(at, ask_of(rng, prompt, answer, None)) for at, prompt, answer in lengths]
    runs: dict[str, list[dict[str, Any]]] = {"hedging": [], "no hedging": []}
    for repeat in range(args.repeats):
        for name in turned(tuple(runs), repeat):
            flags = () if name == "hedging" else ("--no-hedging",)
            with lab_up(session, EQUAL, HOSTS, *flags) as url:
                met: list[int] = []
                with background(_stall_now_and_then, session, url, Random(repeat), args.every, met):
                    answers = asyncio.run(_at(session, url, asks))
                counted = counters(url, session, "shoal_hedge")
            runs[name].append(_of_stalls(answers, sum(met), counted))
            say(f"{name}: {runs[name][-1]}")
    medians = {
        name: percent_of([each["ttft_p99_s"] for each in found], 50) for name, found in runs.items()
    }
    return {
        "rate_per_s": args.rate,
        "every_s": args.every,
        "stalls": runs,
        "ttft_p99_ratio": medians["hedging"] / medians["no hedging"],
        "most_extra_share": max(each["extra_share"] for each in runs["hedging"]),
        "wanted": "a ratio of 0.5 or less with an extra share of 0.05 or less, met by 0.05",
    }


def _of_stalls(
    answers: Sequence[Told], num_met: int, counted: Mapping[str, float]
) -> dict[str, Any]:
    extra = counted["shoal_hedge_extra_tokens_total"] + counted["shoal_hedge_rescued_tokens_total"]
    return {
        "num_requests": len(answers),
        "num_failed": sum(each.finish is None for each in answers),
        "met_share": num_met / len(answers),
        "ttft_p50_s": percent_of(_ttfts(answers), 50),
        "ttft_p99_s": percent_of(_ttfts(answers), 99),
        "longest_gap_s": max(_longest_gaps(answers), default=0.0),
        "extra_share": extra / max(counted["shoal_hedge_computed_tokens_total"], 1.0),
        "num_hedged": counted["shoal_hedge_made_total"],
        "num_rescued": counted["shoal_hedge_rescues_total"],
    }


def _stall_now_and_then(
    session: Session, url: str, rng: Random, every_s: float, met: list[int], ended: Event
) -> None:
    """`met`: requests that were at a replica, or came to it, while it stalled."""
    while not ended.wait(every_s):
        number = rng.randrange(len(HOSTS))
        pids, name = _pids(session, HOSTS[number]), f"replica-{number}"
        before = _replicas(session, url)[name]
        _signal(pids, signal.SIGSTOP)
        time.sleep(STALL_S)
        after = _replicas(session, url)[name]
        _signal(pids, signal.SIGCONT)
        met.append(before["requests"] + after["sent"] - before["sent"])


# --- 3: replicas that die, freeze or are cut off ---


def faults(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """16 streams for two minutes; every 15 s a worker of one of three replicas is killed or
    stopped, or its replica's two stages are cut from each other."""
    rng, record = Random(0), session.folder / "record"
    asks = [ask_of(rng, 200, 96, seed=None if n % 2 else n + 1) for n in range(args.streams)]
    lab, plan = _pipelines(session)
    struck: list[tuple[float, str]] = []
    with session.up(lab, plan, "--record", str(record)) as served:
        url = base_of(served)
        undisturbed = whole(asyncio.run(one_by_one(session, url, asks)))
        with background(_strike_in_turn, session, args.seconds, struck):
            told_s = asyncio.run(_again_and_again(session, url, asks, args.seconds))
        counted = counters(url, session, "shoal_hedge")
    wrong = [
        (number, answer.error or answer.finish or "broken off")
        for number, answer in told_s
        if answer.text != undisturbed[number].text or answer.finish != "length"
    ]
    answers = [answer for _, answer in told_s]
    gaps = _longest_gaps(answers)
    return {
        "num_requests": len(told_s),
        "num_wrong": len(wrong),
        "wrong": wrong[:20],
        "longest_gap_s": max(gaps),
        "its_cause": longest_gap(record / "router.jsonl", struck),
        "p90_of_longest_gaps_s": percent_of(gaps, 90),
        "ttft_p50_s": percent_of(_ttfts(answers), 50),
        "longest_ttft_s": max(_ttfts(answers)),
        "strikes": [what for _, what in struck],
        "hedges": counted,
        "is_met": not wrong and max(gaps) <= 5.0,
    }


def _pipelines(session: Session) -> tuple[Path, Path]:
    """Three equal replicas of two stages on hosts of their own."""
    hosts = ", ".join(
        f"{host}: {{speed: {EQUAL[0]}, threads: 1}}" for pair in _PIPELINES for host in pair
    )
    lab, plan = session.folder / "pipelines.yaml", session.folder / "pipelines-plan.yaml"
    lab.write_text(f"hosts: {{{hosts}}}\n{LINKS}\n")
    stages = (
        f"  - stages: [{{layers: 0-15, devices: [{{device: cpu, host: {first}}}]}}, "
        f"{{layers: 15-30, devices: [{{device: cpu, host: {second}}}]}}]\n"
        for first, second in _PIPELINES
    )
    plan.write_text(f"model: {session.model}\nreplicas:\n{''.join(stages)}")
    return lab, plan


def _strike_in_turn(
    session: Session, seconds: float, struck: list[tuple[float, str]], ended: Event
) -> None:
    """What was done, and when; killed workers come back by themselves."""
    start_s = time.monotonic()
    for (first, second), what in zip(cycle(_PIPELINES), cycle(("kill", "stop", "cut", "kill"))):
        strike_s = time.monotonic()
        if ended.is_set() or strike_s - start_s >= seconds:
            return
        if what == "cut":
            session.lab("cut", first, second)
            struck.append((time.monotonic(), f"cut {first} {second}"))
            ended.wait(DOWN_S)
            session.lab("heal")
        else:
            pids = _pids(session, first)
            struck.append((time.monotonic(), f"{what} {first}"))
            _signal(pids, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            ended.wait(DOWN_S)
            _signal(pids, signal.SIGCONT)
        ended.wait(max(strike_s + STRIKE_EVERY_S - time.monotonic(), 0.0))


async def _again_and_again(
    session: Session, url: str, asks: Sequence[Ask], seconds: float
) -> list[tuple[int, Told]]:
    """A stream for each, which asks again when it is done, until time is up."""
    start_s, found = time.perf_counter(), list[tuple[int, Told]]()

    async def stream(number: int) -> None:
        while time.perf_counter() - start_s < seconds:
            found.append((number, await told(http, url, model, asks[number])))

    async with client(session.api_key) as http:
        model = await served_model(http, url)
        await asyncio.gather(*(stream(number) for number in range(len(asks))))
    return found


# --- 4: one that becomes slow ---


def slowed(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """A replica that is slow in the middle third of a run; goodput of who comes then, beside that
    of a fleet in which it always was."""
    rng = Random(5)
    asks = [  # evenly, or half a second would hold none at times
        (number / args.rate, ask_of(rng, prompt, answer, None))
        for number, (_, prompt, answer) in enumerate(load_of(args, args.requests).requests)
    ]
    slow_s, well_s = asks[-1][0] / 3, 2 * asks[-1][0] / 3
    always = (SLOWED_TO, *UNEQUAL[1:])
    runs: dict[str, list[dict[str, Any]]] = {"slowed": [], "slow from the start": []}
    for repeat in range(args.repeats):
        for name in turned(tuple(runs), repeat):
            speeds = UNEQUAL if name == "slowed" else always
            sent: list[tuple[float, dict[str, int]]] = []
            with (
                lab_up(session, speeds, HOSTS) as url,
                background(_watch_sent, session, url, sent),
            ):
                start_s, changed = time.monotonic(), list[float]()
                if name == "slowed":
                    at = [(slow_s, SLOWED_TO), (well_s, UNEQUAL[0])]
                    with background(_slow_at, session, start_s, at, changed):
                        answers = asyncio.run(_at(session, url, asks))
                else:
                    answers = asyncio.run(_at(session, url, asks))
            then = [
                answer
                for (at_s, _), answer in zip(asks, answers, strict=True)
                if slow_s <= at_s < well_s
            ]
            found = {"goodput": sum(_keeps(each, args) for each in then) / len(then)}
            if name == "slowed":
                carried = SLOWED_TO / sum(always), UNEQUAL[0] / sum(UNEQUAL)
                found |= _shares(sent, *changed, *carried)
            runs[name].append(found)
            say(f"{name}: {found}")
    means = {
        name: sum(each["goodput"] for each in found) / len(found) for name, found in runs.items()
    }
    return {
        "rate_per_s": args.rate,
        "slowed_runs": runs,
        "goodput_ratio": means["slowed"] / max(means["slow from the start"], 1e-9),
        "wanted": "a ratio of 0.85 or more; fell_after_s 1 or less, rose_after_s 5 or less",
    }


def _shares(
    sent: Sequence[tuple[float, Mapping[str, int]]],
    slow_s: float,
    well_s: float,
    carried: float,
    full: float,
) -> dict[str, Any]:
    """Of the slowed replica, in requests that were sent: before, and in each half second.

    Args:
        carried, full: its share of the fleet's speed while it is slow, and else.
    """
    before = _share(sent, sent[0][0], slow_s)
    ends = [slow_s + WINDOW_S * n for n in range(1 + int((sent[-1][0] - slow_s) / WINDOW_S))]
    # Of what comes in the 4 s from then on: half a second holds a request or two.
    later = {at_s: _share(sent, at_s, at_s + 8 * WINDOW_S) for at_s in ends}
    fell = [at for at in ends if at < well_s and (later[at] or 0.0) <= carried + 0.1]
    rose = [
        at for at in ends if at >= well_s and (later[at] or 0.0) >= 0.8 * min(before or 0.0, full)
    ]
    return {
        "share_before": before,
        "share_it_can_carry": carried,
        "share_of_speed": full,
        "fell_after_s": fell[0] - slow_s if fell else None,
        "rose_after_s": rose[0] - well_s if rose else None,
        "sent_each_half_second": [
            [round(at_s - slow_s, 1), *_counts(sent, at_s, at_s + WINDOW_S).values()]
            for at_s in ends
        ],
    }


def _counts(
    sent: Sequence[tuple[float, Mapping[str, int]]], start_s: float, end_s: float
) -> dict[str, int]:
    by_start = [counts for at_s, counts in sent if at_s <= start_s] or [sent[0][1]]
    by_end = [counts for at_s, counts in sent if at_s <= end_s] or [sent[0][1]]
    return {name: by_end[-1][name] - by_start[-1][name] for name in by_end[-1]}


def _share(
    sent: Sequence[tuple[float, Mapping[str, int]]], start_s: float, end_s: float
) -> float | None:
    """Of replica-0; None: nothing was sent."""
    counts = _counts(sent, start_s, end_s)
    total = sum(counts.values())
    return counts["replica-0"] / total if total else None


def _watch_sent(
    session: Session, url: str, sent: list[tuple[float, dict[str, int]]], ended: Event
) -> None:
    while not ended.wait(WINDOW_S / 5):
        found = _replicas(session, url)
        sent.append((time.monotonic(), {name: found[name]["sent"] for name in found}))


def _slow_at(
    session: Session,
    start_s: float,
    speeds: Sequence[tuple[float, float]],
    changed: list[float],
    ended: Event,
) -> None:
    """Notes when each speed held: the command itself takes a second or two beside the load."""
    for at_s, speed in speeds:
        ended.wait(max(start_s + at_s - time.monotonic(), 0.0))
        session.lab("slow", HOSTS[0], str(speed))
        changed.append(time.monotonic())


def _keeps(answer: Told, args: argparse.Namespace) -> bool:
    if answer.finish is None or answer.ttft_s is None or answer.ttft_s > args.slo_ttft:
        return False
    gaps = answer.gaps_s
    return not gaps or sum(gaps) / len(gaps) <= args.slo_tpot


# --- shared ---


async def _at(session: Session, url: str, asks: Sequence[tuple[float, Ask]]) -> list[Told]:
    async with client(session.api_key) as http:
        return await at_times(http, url, asks)


def _replicas(session: Session, url: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {session.api_key}"}
    found: dict[str, Any] = httpx.get(f"{url}/admin/replicas", headers=headers).json()["replicas"]
    return found


def _pids(session: Session, host: str) -> list[int]:
    """Of the workers on a host, just now."""
    workers = json.loads(session.lab("status", "--json"))["workers"]
    return [each["pid"] for each in workers if each["host"] == host and each["pid"] is not None]


def _signal(pids: Sequence[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            say(f"{pid} is gone")


def _ttfts(answers: Sequence[Told]) -> list[float]:
    return [answer.ttft_s for answer in answers if answer.ttft_s is not None]


def _longest_gaps(answers: Sequence[Told]) -> list[float]:
    return [max(answer.gaps_s, default=0.0) for answer in answers]


@contextmanager
def background(what: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """In a thread that is told, by its last argument, when it has been long enough."""
    ended = Event()
    thread = Thread(target=what, args=(*arguments, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
