"""TTFT and TPOT under a steady load, where `concurrency` requests are always there.

    TPOT   decode of the batch in the middle of the answers + B x prefill / answer's tokens
    TTFT   the prompt's own prefill + the Step it waits for + the requests whose KV is in the way

Each answered request is followed by another, whose prefill all others wait for once: B prefills
while each of the B makes its answer. With p stages, the batch goes through as p micro-batches: a
token takes what all stages take, or p times the slowest. Where KV holds fewer than are there, so
many run, and the others wait for their turn. Knows nothing of arrivals: a mean of a steady state.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.policy.cost_model.loads import StepLoad, windows_of
from shoal.policy.cost_model.times import ReplicaCost, StepTime


@dataclass(frozen=True, slots=True)
class Served:
    """
    Attributes:
        num_running: requests whose KV fits.
        time: of one token, by what it is spent on.
        error: relative, of TPOT.
    """

    num_running: int
    ttft_s: float
    tpot_s: float
    time: StepTime
    error: float


def closed_loop(
    replica: ReplicaCost,
    *,
    concurrency: int,
    isl: int,
    osl: int,
    kv_tokens: int | None = None,
    route: int = 0,
) -> Served:
    """
    Args:
        concurrency: requests at one time.
        isl, osl: tokens of a prompt, and of an answer.
        kv_tokens: that KV is kept of at one time; None: of all.
    """
    context = isl + osl // 2
    running = concurrency
    if kv_tokens is not None:
        running = max(1, min(concurrency, kv_tokens // context))
    windows = windows_of(replica.spec)
    stages = len(replica.hops(route))
    num_parts = min(stages, running)
    rows = -(-running // num_parts)
    decode = _pass(replica, StepLoad.decode(rows, context, windows), route, num_parts)
    prefill = _pass(replica, StepLoad.prefill(isl, 0, windows), route, 1)
    slowest = _slowest(replica, StepLoad.prefill(isl, 0, windows), route)
    time = decode + slowest.times(running / osl)
    wait_s = (concurrency / running - 1) * (prefill.total_s + osl * time.total_s)
    ttft_s = wait_s + prefill.total_s + decode.total_s
    return Served(running, ttft_s, time.total_s, time, replica.error)


def _pass(replica: ReplicaCost, load: StepLoad, route: int, num_parts: int) -> StepTime:
    """One way through all stages, or the time between two micro-batches of as many as there are."""
    times = replica.step_times(load, route)
    whole = StepTime(communication_s=sum(replica.hop_times(load.num_tokens, route)))
    for each in times:
        whole = whole + each
    busiest = max(times, key=_total).times(num_parts)
    return max(whole, busiest, key=_total)


def _slowest(replica: ReplicaCost, load: StepLoad, route: int) -> StepTime:
    return max(replica.step_times(load, route), key=_total)


def _total(time: StepTime) -> float:
    return time.total_s
