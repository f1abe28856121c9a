"""What choosing a replica costs a router, by policy and size of the fleet.

    python benchmarks/router_decision.py -o benchmarks/results/router_decision_DATE

A router state alone, without sockets: requests of random lengths, half of them with one of some
beginnings in common, come to replicas of unlike speeds that have eight each; one of those that run
ends for each that comes. Each size is a process of its own, so that its memory shows. A decision is
choosing alone; a request is all that the router does until it is sent.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from lab_session import conditions

from shoal.core.latency import percentile
from shoal.core.request import GenerateRequest, Output, SamplingParams
from shoal.core.speed import Speed
from shoal.core.stats import EngineInfo
from shoal.policy.routing import POLICIES
from shoal.router.events import Effect, ReplicaOutputs, ReplicaReady, Send, Submit
from shoal.router.placement import Placement
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState

SIZES = (10, 100, 1000)
NUM_REQUESTS, OF_EACH = 4000, 8
INFO = EngineInfo(
    max_model_len=8192,
    num_kv_blocks=10_000,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    max_waiting=256,
    device="none",
    dtype="none",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=None, help="of a .json and a .md")
    parser.add_argument("--size", type=int, default=None, help="only this one, as JSON")
    parser.add_argument("--policy", default="predicted", help="with --size")
    args = parser.parse_args()
    if args.size is not None:
        sys.stdout.write(json.dumps(measured(args.size, args.policy)) + "\n")
        return
    found = {
        policy: {str(size): _in_own_process(size, policy) for size in SIZES} for policy in POLICIES
    }
    report = {
        **conditions(sys.argv),
        "policies": found,
    }
    table = _table(report)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table)
    sys.stdout.write(table)


class _TimedState(RouterState):
    """Notes what choosing takes."""

    def __init__(self, config: RouterConfig, rng: Random) -> None:
        super().__init__(config, rng)
        self.decisions_s: list[float] = []
        choose = self._placement.choose

        def timed(*args: Any) -> Any:
            began_s = time.perf_counter()
            found = choose(*args)
            self.decisions_s.append(time.perf_counter() - began_s)
            return found

        placement: Placement = self._placement
        placement.choose = timed  # type: ignore[method-assign]


def measured(size: int, policy: str) -> dict[str, float]:
    rng = Random(size)
    names = tuple(f"replica-{number}" for number in range(size))
    speeds = {name: _some_speed(rng) for name in names}
    state = _TimedState(RouterConfig(replicas=names, policy=policy, speeds=speeds), Random(0))
    for name in names:
        state.handle(ReplicaReady(name, 0, INFO), 0.0)
    beginnings = [_tokens(rng, 512) for _ in range(20)]
    requests = [_some_request(rng, number, beginnings) for number in range(NUM_REQUESTS)]
    running: list[Send] = []
    requests_s: list[float] = []
    now = 0.0
    for request in requests:
        now += 0.5 / size
        began_s = time.perf_counter()
        effects = state.handle(Submit(request), now)
        requests_s.append(time.perf_counter() - began_s)
        running += _begun(state, effects, now)
        if len(running) > OF_EACH * size:
            running += _ended(state, running.pop(rng.randrange(len(running))), now)
    settled = len(state.decisions_s) // 4
    return {
        "decision_us": 1e6 * percentile(sorted(state.decisions_s[settled:]), 50),
        "decision_p99_us": 1e6 * percentile(sorted(state.decisions_s[settled:]), 99),
        "request_us": 1e6 * percentile(sorted(requests_s[len(requests_s) // 4 :]), 50),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _begun(state: RouterState, effects: Sequence[Effect], now: float) -> list[Send]:
    """What was sent; each gets its first token at once."""
    sent = [each for each in effects if isinstance(each, Send)]
    for each in sent:
        name = each.request.request_id
        first = Output(request_id=name, token_ids=(1,), num_cached_tokens=0)
        sent += _begun(state, state.handle(ReplicaOutputs(each.replica, 0, [first]), now), now)
    return sent


def _ended(state: RouterState, sent: Send, now: float) -> list[Send]:
    """Its other tokens; what is sent then."""
    rest = Output(request_id=sent.request.request_id, token_ids=(2, 3, 4), finish="length")
    return _begun(state, state.handle(ReplicaOutputs(sent.replica, 0, [rest]), now), now)


def _some_speed(rng: Random) -> Speed:
    slower = rng.uniform(0.5, 4.0)
    return Speed(0.01 * slower, 1e-4 * slower * rng.uniform(0.5, 2.0), 1e-5, 1e-8, 1e-12)


def _some_request(rng: Random, number: int, beginnings: list[tuple[int, ...]]) -> GenerateRequest:
    beginning = rng.choice(beginnings) if number % 2 else ()
    return GenerateRequest(
        request_id=str(number),
        prompt_ids=(*beginning, *_tokens(rng, rng.randrange(50, 1500))),
        sampling=SamplingParams(max_tokens=rng.randrange(10, 400), seed=number),
    )


def _tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(100_000) for _ in range(count))


def _in_own_process(size: int, policy: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--size", str(size), "--policy", policy]
    found: dict[str, float] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return found


def _table(report: dict[str, Any]) -> str:
    sizes = " | ".join(f"{size} replicas" for size in SIZES)
    lines = [
        f"`{report['command']}` at {report['commit']}, {report['machine']}",
        "",
        "Microseconds of a decision (p99), of a request until it is sent; peak memory.",
        "",
        f"| policy | {sizes} |",
        f"|---{'|---' * len(SIZES)}|",
    ]
    for policy, found in report["policies"].items():
        cells = [
            f"{each['decision_us']:.0f} ({each['decision_p99_us']:.0f}), "
            f"{each['request_us']:.0f}; {each['peak_memory_bytes'] / 1e6:.0f} MB"
            for each in found.values()
        ]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
