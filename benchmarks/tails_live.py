"""What the door does to tails, live: unequal lab replicas of a real model, one scenario a function.

Each brings a lab up, does something to it under load, and returns numbers; with and without a
feature in turn, where one is judged. Knows nothing of tables or of the simulator.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
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


def plan_file(session: Session, hosts: Sequence[str]) -> Path:
    replicas = "".join(
        f"  - stages: [{{layers: 0-30, devices: [{{device: cpu, host: {host}}}]}}]\n"
        for host in hosts
    )
    path = session.folder / f"plan-{'-'.join(hosts)}.yaml"
    path.write_text(f"model: {session.model}\nreplicas:\n{replicas}")
    return path


def lab_file(session: Session, speeds: Sequence[float]) -> Path:
    hosts = ", ".join(
        f"{host}: {{speed: {speed}, threads: 1}}" for host, speed in zip(HOSTS, speeds, strict=True)
    )
    path = session.folder / "lab.yaml"
    path.write_text(f"hosts: {{{hosts}}}\n{LINKS}\n")
    return path


def load_of(args: argparse.Namespace, count: int) -> Trace:
    return azure(args.trace, 0, count, args.shrink, LONGEST)


def base_of(url: str) -> str:
    return url.removesuffix("/v1")


@contextmanager
def lab_up(
    session: Session, speeds: Sequence[float], named: Sequence[str], *flags: str
) -> Iterator[str]:
    with session.up(lab_file(session, speeds), plan_file(session, named), *flags) as url:
        yield base_of(url)


# --- 1: which replica ---


def policies(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """The same load under each policy, in turn."""
    load = load_of(args, args.requests)
    alone = _unloaded(session, args, load)
    rate = args.share * _capacity(session, args, load)
    slo = {"ttft": 3 * alone["ttft"], "tpot": 1.5 * alone["tpot"]}
    bound = f"ttft={slo['ttft'] * 1e3:.0f}ms,tpot={slo['tpot'] * 1e3:.1f}ms"
    path = load.at_rate(rate).write(session.folder / "load.jsonl")
    runs: dict[str, list[Any]] = {name: [] for name in POLICIES}
    for repeat in range(args.repeats):
        for name in turned(POLICIES, repeat):
            told = ("--slo", bound) if args.told else ()
            with lab_up(session, UNEQUAL, HOSTS, "--router-policy", name, *told) as url:
                flags = ("--slo", bound, "--seed", str(repeat))
                report = session.bench(url, path, args.vocab_size, *flags)
                runs[name].append(shortened(report))
                tell(name, report)
    return {"rate_per_s": rate, "slo_s": slo, "unloaded_s": alone, "runs": runs}


def _unloaded(session: Session, args: argparse.Namespace, load: Trace) -> dict[str, float]:
    """Medians of single requests at the slowest replica."""
    rng = Random(3)
    asks = [ask_of(rng, prompt, answer, None) for _, prompt, answer in load.requests[:_NUM_ALONE]]
    with lab_up(session, UNEQUAL, HOSTS[-1:]) as url:
        answers = whole(asyncio.run(one_by_one(session, url, asks)))
    return {
        "ttft": statistics.median(each.ttft_s or 0.0 for each in answers),
        "tpot": statistics.median(statistics.fmean(each.gaps_s) for each in answers),
    }


def _capacity(session: Session, args: argparse.Namespace, load: Trace) -> float:
    """Requests per second when as many as may run always do."""
    crowd = load.at_rate(1e4).write(session.folder / "crowd.jsonl")
    with lab_up(session, UNEQUAL, HOSTS) as url:
        report = session.bench(url, crowd, args.vocab_size, "--max-concurrency", "32")
    found: float = report["throughput"]["requests_per_s"]
    return found


# --- 6: a long prompt among streams ---


def long_prompt(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """ITL of 8 streams and TTFT of a prompt of 7,500 tokens, each alone and together."""
    rng = Random(1)
    streams = [ask_of(rng, 64, 400, seed=n + 1) for n in range(8)]
    long = Ask(prompt=words(rng, 6_620), max_tokens=8)
    found: dict[str, list[Any]] = {"itl_p99_alone": [], "itl_p99": [], "ttft_alone": [], "ttft": []}
    with lab_up(session, UNEQUAL, HOSTS[:1]) as url:
        for repeat in range(args.repeats):
            own = Ask(prompt=f"{repeat} {long.prompt}", max_tokens=8)
            other = Ask(prompt=f"{repeat}, {long.prompt}", max_tokens=8)
            alone = whole(asyncio.run(at_their_times(session, url, [(0.0, own)])))
            calm = whole(
                asyncio.run(at_their_times(session, url, [(0.0, each) for each in streams]))
            )
            together = [*((0.0, each) for each in streams), (2.0, other)]
            both = whole(asyncio.run(at_their_times(session, url, together)))
            found["ttft_alone"].append(alone[0].ttft_s)
            found["ttft"].append(both[-1].ttft_s)
            found["itl_p99_alone"].append(percent_of(_gaps(calm), 99))
            found["itl_p99"].append(percent_of(_gaps(both[:-1]), 99))
            say(str({name: each[-1] for name, each in found.items()}))
    return found


async def at_their_times(
    session: Session, url: str, asks: Sequence[tuple[float, Ask]]
) -> list[Told]:
    async with client(session.api_key) as http:
        return await at_times(http, url, asks)


# --- 8: ten times too much ---


def overload(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """A minute of ten times what the lab can carry, and what comes after; the router knows speeds
    from the start if there is a cluster file."""
    rng = Random(2)
    slo = f"ttft={args.slo_ttft}s,tpot={args.slo_tpot}s"
    known = () if args.cluster is None else ("--cluster", str(args.cluster))
    with lab_up(session, UNEQUAL, HOSTS, "--slo", slo, *known) as url:
        count = round(10 * args.rate * args.seconds)
        asks = [(number / (10 * args.rate), ask_of(rng, 128, 32, None)) for number in range(count)]
        after = [(args.seconds + 5 + n / args.rate, ask_of(rng, 128, 32, None)) for n in range(20)]
        answers = asyncio.run(at_their_times(session, url, [*asks, *after]))
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
        "missed": [
            {"at_s": at_s, "ttft_s": each.ttft_s, "tpot_s": _tpot_s(each), "error": each.error}
            for (at_s, _), each in zip(asks, flood, strict=True)
            if each.status == 200 and not _keeps(each, args)
        ],
        "refusal_p95_s": percent_of([each.end_s for each in refused], 95),
        "retry_after_s": statistics.median([each.retry_after_s or 0.0 for each in refused] or [0]),
        "after": {"served": sum(_keeps(each, args) for each in later), "of": len(later)},
    }


def _keeps(answer: Told, args: argparse.Namespace) -> bool:
    if answer.finish is None or answer.ttft_s is None or answer.ttft_s > args.slo_ttft:
        return False
    tpot_s = _tpot_s(answer)
    return tpot_s is None or tpot_s <= args.slo_tpot


def _tpot_s(answer: Told) -> float | None:
    gaps = answer.gaps_s
    return sum(gaps) / len(gaps) if gaps else None


# --- shared ---


async def one_by_one(session: Session, url: str, asks: Sequence[Ask]) -> list[Told]:
    """One after the other."""
    async with client(session.api_key) as http:
        model = await served_model(http, url)
        return [await told(http, url, model, each) for each in asks]


def turned(names: Sequence[str], by: int) -> list[str]:
    """Another one first each time, so that none always has the quietest machine."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def shortened(report: Any) -> dict[str, Any]:
    latency = report["latency_s"]
    found = {
        f"{metric} {share}": latency[metric][share]
        for metric in ("ttft", "tpot")
        for share in ("p50", "p99", "p99.9")
    }
    goodput = report.get("goodput", {}).get("share")
    return {**found, "goodput": goodput, "requests": report["requests"], "cdf": report["cdf"]}


def counters(url: str, session: Session, beginning: str) -> dict[str, float]:
    headers = {"Authorization": f"Bearer {session.api_key}"}
    lines = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(beginning))
    return {name: float(value) for name, value in pairs}


def ask_of(rng: Random, num_words: int, max_tokens: int, seed: int | None) -> Ask:
    return Ask(prompt=words(rng, num_words), max_tokens=max_tokens, seed=seed)


def words(rng: Random, count: int) -> str:
    return " ".join(rng.choice(TOPICS) for _ in range(count))


def _gaps(answers: Sequence[Told]) -> list[float]:
    return [gap for each in answers for gap in each.gaps_s]


def whole(answers: list[Told]) -> list[Told]:
    """All of them, or the end."""
    for each in answers:
        if each.finish is None:
            sys.exit(f"a request failed: {each.status} {each.error}")
    return answers


def percent_of(values: Sequence[float], percent: float) -> float:
    return percentile(sorted(values), percent) if values else 0.0


def tell(name: str, report: Any) -> None:
    say(f"{name}: {report['latency_s']['ttft']} {report.get('goodput')} {report['requests']}")


def say(what: str) -> None:
    sys.stderr.write(f"{what}\n")
