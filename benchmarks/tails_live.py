"""What the door does to tails, live: unequal lab replicas of a real model, one scenario a function.

Each brings a lab up, does something to it under load, and returns numbers; with and without a
feature in turn, where one is judged. Knows nothing of tables or of the simulator.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import httpx
from lab_session import Session, Trace, azure
from streams import Ask, Told, at_times, client, served_model, told

from shoal.core.latency import percentile

HOSTS = ("a", "b", "c")
UNEQUAL, EQUAL = (1.0, 0.5, 0.25), (0.6, 0.6, 0.6)
"""Speeds of the three hosts."""
LINKS = "links: {default: {bandwidth: 1Gbit, latency: 200us}}"
POLICIES = ("predicted", "least-outstanding", "round-robin")
LONGEST = (2048, 256)
_NUM_ALONE = 8
TOPICS = ("rivers", "bridges", "harbours", "winters", "engines", "gardens", "markets", "letters")


def _plan(session: Session, hosts: Sequence[str]) -> Path:
    replicas = "".join(
        f"  - stages: [{{layers: 0-30, devices: [{{device: cpu, host: {host}}}]}}]\n"
        for host in hosts
    )
    path = session.folder / f"plan-{'-'.join(hosts)}.yaml"
    path.write_text(f"model: {session.model}\nreplicas:\n{replicas}")
    return path


def _lab(session: Session, speeds: Sequence[float]) -> Path:
    hosts = ", ".join(
        f"{host}: {{speed: {speed}, threads: 1}}" for host, speed in zip(HOSTS, speeds, strict=True)
    )
    path = session.folder / "lab.yaml"
    path.write_text(f"hosts: {{{hosts}}}\n{LINKS}\n")
    return path


def _load(args: argparse.Namespace, count: int) -> Trace:
    return azure(args.trace, 0, count, args.shrink, LONGEST)


def _base(url: str) -> str:
    return url.removesuffix("/v1")


@contextmanager
def _up(
    session: Session, speeds: Sequence[float], named: Sequence[str], *flags: str
) -> Iterator[str]:
    with session.up(_lab(session, speeds), _plan(session, named), *flags) as url:
        yield _base(url)


# --- 1: which replica ---


def policies(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """The same load under each policy, in turn."""
    load = _load(args, args.requests)
    alone = _unloaded(session, args, load)
    rate = args.share * _capacity(session, args, load)
    slo = {"ttft": 3 * alone["ttft"], "tpot": 1.5 * alone["tpot"]}
    bound = f"ttft={slo['ttft'] * 1e3:.0f}ms,tpot={slo['tpot'] * 1e3:.1f}ms"
    path = load.at_rate(rate).write(session.folder / "load.jsonl")
    runs: dict[str, list[Any]] = {name: [] for name in POLICIES}
    for repeat in range(args.repeats):
        for name in _turned(POLICIES, repeat):
            with _up(session, UNEQUAL, HOSTS, "--router-policy", name) as url:
                flags = ("--slo", bound, "--seed", str(repeat))
                report = session.bench(url, path, args.vocab_size, *flags)
                runs[name].append(_short(report))
                _tell(name, report)
    return {"rate_per_s": rate, "slo_s": slo, "unloaded_s": alone, "runs": runs}


def _unloaded(session: Session, args: argparse.Namespace, load: Trace) -> dict[str, float]:
    """Medians of single requests at the slowest replica."""
    rng = Random(3)
    asks = [_ask(rng, prompt, answer, None) for _, prompt, answer in load.requests[:_NUM_ALONE]]
    with _up(session, UNEQUAL, HOSTS[-1:]) as url:
        answers = _whole(asyncio.run(_all(session, url, asks)))
    return {
        "ttft": statistics.median(each.ttft_s or 0.0 for each in answers),
        "tpot": statistics.median(statistics.fmean(each.gaps_s) for each in answers),
    }


def _capacity(session: Session, args: argparse.Namespace, load: Trace) -> float:
    """Requests per second when as many as may run always do."""
    crowd = load.at_rate(1e4).write(session.folder / "crowd.jsonl")
    with _up(session, UNEQUAL, HOSTS) as url:
        report = session.bench(url, crowd, args.vocab_size, "--max-concurrency", "32")
    found: float = report["throughput"]["requests_per_s"]
    return found


# --- 2: stalls ---


def stalls(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """A replica that does nothing for 2 s, now and then, with hedging and without."""
    load = _load(args, args.requests)
    path = load.at_rate(args.rate).write(session.folder / "load.jsonl")
    runs: dict[str, list[Any]] = {"hedging": [], "no hedging": []}
    for repeat in range(args.repeats):
        for name in _turned(tuple(runs), repeat):
            flags = () if name == "hedging" else ("--no-hedging",)
            with _up(session, EQUAL, HOSTS, *flags) as url:
                with _background(_stall_now_and_then, session, Random(repeat), args.every):
                    report = session.bench(url, path, args.vocab_size, "--seed", str(repeat))
                counted = _counters(url, session, "shoal_hedge")
                runs[name].append({**_short(report), **counted})
                _tell(name, report)
    return {"rate_per_s": args.rate, "every_s": args.every, "runs": runs}


def _stall_now_and_then(session: Session, rng: Random, every_s: float, ended: Event) -> None:
    while not ended.is_set():
        ended.wait(every_s)
        host = rng.choice(HOSTS)
        session.lab("stop", host)
        time.sleep(2.0)
        session.lab("resume", host)


# --- 3: replicas that die, freeze or are cut off ---


def faults(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """16 streams for two minutes; every 15 s something happens to one of three replicas."""
    rng = Random(0)
    asks = [_ask(rng, 200, 96, seed=None if n % 2 else n + 1) for n in range(args.streams)]
    with _up(session, EQUAL, HOSTS) as url:
        undisturbed = _whole(asyncio.run(_all(session, url, asks)))
        with _background(_strike_in_turn, session, args.seconds):
            told_s = asyncio.run(_again_and_again(session, url, asks, args.seconds))
    wrong = [
        (number, answer.error or answer.finish or "broken off")
        for number, answer in told_s
        if answer.text != undisturbed[number].text or answer.finish != "length"
    ]
    return {
        "num_requests": len(told_s),
        "num_wrong": len(wrong),
        "wrong": wrong[:20],
        "longest_gap_s": max(_longest_gaps(told_s)),
        "p90_of_longest_gaps_s": _percentile(_longest_gaps(told_s), 90),
        "ttft_p50_s": _percentile(_ttfts(told_s), 50),
        "longest_ttft_s": max(_ttfts(told_s)),
    }


def _longest_gaps(told_s: Sequence[tuple[int, Told]]) -> list[float]:
    return [max(answer.gaps_s, default=0.0) for _, answer in told_s]


def _ttfts(told_s: Sequence[tuple[int, Told]]) -> list[float]:
    return [answer.ttft_s for _, answer in told_s if answer.ttft_s is not None]


def _strike_in_turn(session: Session, seconds: float, ended: Event) -> None:
    start_s, number = time.monotonic(), 0
    while not ended.is_set() and time.monotonic() - start_s < seconds:
        host, what = HOSTS[number % 3], ("kill", "stop")[number % 2]
        _say(f"{what} {host}")
        session.lab(what, host)
        time.sleep(8.0)
        if what == "stop" and not ended.is_set():
            _quietly(session, "resume", host)
        time.sleep(7.0)
        number += 1


async def _all(session: Session, url: str, asks: Sequence[Ask]) -> list[Told]:
    """One after the other."""
    async with client(session.api_key) as http:
        model = await served_model(http, url)
        return [await told(http, url, model, each) for each in asks]


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
    """Goodput while a replica is slow, beside that of a fleet in which it always was."""
    load = _load(args, args.requests)
    path = load.at_rate(args.rate).write(session.folder / "load.jsonl")
    runs: dict[str, list[Any]] = {"slowed": [], "slow from the start": []}
    for repeat in range(args.repeats):
        for name in _turned(tuple(runs), repeat):
            speeds = UNEQUAL if name == "slowed" else (0.2, *UNEQUAL[1:])
            with _up(session, speeds, HOSTS) as url, _watched(session, url) as shares:
                if name == "slowed":
                    session.lab("slow", "a", "0.2")
                report = session.bench(url, path, args.vocab_size, "--seed", str(repeat))
            runs[name].append({**_short(report), "share": shares})
            _tell(name, report)
    return {"rate_per_s": args.rate, "runs": runs}


@contextmanager
def _watched(session: Session, url: str) -> Iterator[list[Any]]:
    """Requests at each replica, looked at every quarter of a second."""
    seen: list[Any] = []
    headers = {"Authorization": f"Bearer {session.api_key}"}

    def look(ended: Event) -> None:
        while not ended.wait(0.25):
            found = httpx.get(f"{url}/admin/replicas", headers=headers).json()["replicas"]
            seen.append((time.monotonic(), {name: found[name]["requests"] for name in found}))

    with _background(look):
        yield seen


# --- 6: a long prompt among streams ---


def long_prompt(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """ITL of 8 streams and TTFT of a prompt of 7,500 tokens, each alone and together."""
    rng = Random(1)
    streams = [_ask(rng, 64, 400, seed=n + 1) for n in range(8)]
    long = Ask(prompt=_words(rng, 6_620), max_tokens=8)
    found: dict[str, list[Any]] = {"itl_p99_alone": [], "itl_p99": [], "ttft_alone": [], "ttft": []}
    with _up(session, UNEQUAL, HOSTS[:1]) as url:
        for repeat in range(args.repeats):
            own = Ask(prompt=f"{repeat} {long.prompt}", max_tokens=8)
            other = Ask(prompt=f"{repeat}, {long.prompt}", max_tokens=8)
            alone = _whole(asyncio.run(_at(session, url, [(0.0, own)])))
            calm = _whole(asyncio.run(_at(session, url, [(0.0, each) for each in streams])))
            together = [*((0.0, each) for each in streams), (2.0, other)]
            both = _whole(asyncio.run(_at(session, url, together)))
            found["ttft_alone"].append(alone[0].ttft_s)
            found["ttft"].append(both[-1].ttft_s)
            found["itl_p99_alone"].append(_percentile(_gaps(calm), 99))
            found["itl_p99"].append(_percentile(_gaps(both[:-1]), 99))
            _say(str({name: each[-1] for name, each in found.items()}))
    return found


async def _at(session: Session, url: str, asks: Sequence[tuple[float, Ask]]) -> list[Told]:
    async with client(session.api_key) as http:
        return await at_times(http, url, asks)


# --- 8: ten times too much ---


def overload(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """A minute of ten times what the lab can carry, and what comes after."""
    rng = Random(2)
    slo = f"ttft={args.slo_ttft}s,tpot={args.slo_tpot}s"
    with _up(session, UNEQUAL, HOSTS, "--slo", slo) as url:
        count = round(10 * args.rate * args.seconds)
        asks = [(number / (10 * args.rate), _ask(rng, 128, 32, None)) for number in range(count)]
        after = [(args.seconds + 5 + n / args.rate, _ask(rng, 128, 32, None)) for n in range(20)]
        answers = asyncio.run(_at(session, url, [*asks, *after]))
    flood, later = answers[:count], answers[count:]
    refused = [each for each in flood if each.status == 429]
    accepted = [each for each in flood if each.status == 200]
    other = [each for each in flood if each.status not in (200, 429)]
    kept = [each for each in accepted if _keeps(each, args)]
    return {
        "num_requests": count,
        "num_accepted": len(accepted),
        "num_refused": len(refused),
        "others": [(each.status, each.error) for each in other[:5]],
        "share_kept": len(kept) / max(len(accepted), 1),
        "refusal_p95_s": _percentile([each.end_s for each in refused], 95),
        "retry_after_s": statistics.median([each.retry_after_s or 0.0 for each in refused] or [0]),
        "after": {"served": sum(_keeps(each, args) for each in later), "of": len(later)},
    }


def _keeps(answer: Told, args: argparse.Namespace) -> bool:
    if answer.finish is None or answer.ttft_s is None or answer.ttft_s > args.slo_ttft:
        return False
    gaps = answer.gaps_s
    return not gaps or sum(gaps) / len(gaps) <= args.slo_tpot


# --- shared ---


def _turned(names: Sequence[str], by: int) -> list[str]:
    """Another one first each time, so that none always has the quietest machine."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def _short(report: Any) -> dict[str, Any]:
    latency = report["latency_s"]
    found = {
        f"{metric} {share}": latency[metric][share]
        for metric in ("ttft", "tpot")
        for share in ("p50", "p99", "p99.9")
    }
    goodput = report.get("goodput", {}).get("share")
    return {**found, "goodput": goodput, "requests": report["requests"], "cdf": report["cdf"]}


def _counters(url: str, session: Session, beginning: str) -> dict[str, float]:
    headers = {"Authorization": f"Bearer {session.api_key}"}
    lines = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(beginning))
    return {name: float(value) for name, value in pairs}


def _ask(rng: Random, num_words: int, max_tokens: int, seed: int | None) -> Ask:
    return Ask(prompt=_words(rng, num_words), max_tokens=max_tokens, seed=seed)


def _words(rng: Random, count: int) -> str:
    return " ".join(rng.choice(TOPICS) for _ in range(count))


def _gaps(answers: Sequence[Told]) -> list[float]:
    return [gap for each in answers for gap in each.gaps_s]


def _whole(answers: list[Told]) -> list[Told]:
    """All of them, or the end."""
    for each in answers:
        if each.finish is None:
            sys.exit(f"a request failed: {each.status} {each.error}")
    return answers


def _percentile(values: Sequence[float], percent: float) -> float:
    return percentile(sorted(values), percent) if values else 0.0


@contextmanager
def _background(what: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """In a thread that is told, by its last argument, when it has been long enough."""
    ended = Event()
    thread = Thread(target=what, args=(*arguments, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _quietly(session: Session, *arguments: str) -> None:
    """The worker may have been ended and started again meanwhile."""
    try:
        session.lab(*arguments)
    except SystemExit as ended:
        _say(str(ended))


def _tell(name: str, report: Any) -> None:
    _say(f"{name}: {report['latency_s']['ttft']} {report.get('goodput')} {report['requests']}")


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")
