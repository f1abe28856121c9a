"""An outcome for people and for programs: one report as plain data, and its text.

    report         replicas, stages, what binds, what is left out
    text           the same in lines; `explained` adds tables of where the time goes

Knows nothing of how a plan is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.core.split import stacked
from shoal.planner.choice import Choice
from shoal.planner.pipeline import Operation, Segment
from shoal.planner.quality import loss_of, percent
from shoal.planner.quality_text import bits_line, other_quality, quality_line
from shoal.planner.search import Outcome
from shoal.planner.what_if import LeftOut, RunnerUp
from shoal.policy.cost_model.times import StepTime

_UNITS = {"goodput": "requests/s", "latency": "s", "cost": ""}


def report(
    outcome: Outcome,
    gone: Sequence[LeftOut],
    more: Sequence[tuple[str, float]] = (),
    others: Sequence[RunnerUp] = (),
) -> dict[str, Any]:
    """Everything as numbers, text and lists.

    Args:
        gone: devices of no replica.
        more: what one more device of each kind would bring.
        others: plans for other wishes.
    """
    goal = outcome.problem.goal
    return {
        "objective": goal.objective,
        "value": outcome.value,
        "bound": outcome.value if outcome.is_exact else outcome.bound,
        "gap": outcome.gap,
        "exact": outcome.is_exact,
        "looked_at": outcome.num_looked_at,
        "unmet": list(outcome.unmet),
        "rate_per_s": goal.rate_per_s,
        "arriving_per_s": outcome.flow_per_s,
        "requests_per_s": outcome.capacity_per_s,
        "tokens_per_s": outcome.capacity_per_s * goal.output_tokens,
        "ttft_s": outcome.mean("ttft"),
        "tpot_s": outcome.mean("tpot"),
        "latency_s": outcome.mean("latency"),
        "usd_per_hour": _total(outcome, "usd_per_hour"),
        "watts": _total(outcome, "watts"),
        "error": _error(outcome),
        "quality_loss": percent(outcome.log_loss),
        "precisions": list(_precisions(outcome)),
        "replicas": [
            _replica(choice, operation)
            for choice, operation in zip(outcome.choices, outcome.at_rate, strict=True)
        ],
        "left_out": [
            {"devices": list(each.names), "kind": each.kind, "reason": each.reason} for each in gone
        ],
        "one_more": [{"kind": kind, "requests_per_s": gain} for kind, gain in more],
        "runner_ups": [
            {
                "wish": each.wish,
                "replicas": len(each.outcome.choices),
                "stages": [len(c.chain.segments) for c in each.outcome.choices],
                "requests_per_s": each.outcome.capacity_per_s,
                "ttft_s": each.outcome.mean("ttft"),
                "tpot_s": each.outcome.mean("tpot"),
                "quality_loss": percent(each.outcome.log_loss),
                "keeps_wishes": not each.outcome.unmet,
            }
            for each in others
        ],
    }


def _total(outcome: Outcome, what: str) -> float | None:
    """Of all devices in use; None: not known of one of them."""
    names = [name for each in outcome.choices for name in each.names]
    values = [getattr(outcome.problem.cluster.device(name), what) for name in names]
    return None if any(each is None for each in values) else float(sum(values))


def _precisions(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """What each of those in use would cost in all layers."""
    used = {
        segment.group.variants[number].precision: None
        for choice in outcome.choices
        for segment, number in zip(choice.chain.segments, choice.operation.variants, strict=True)
    }
    for precision in used:
        loss = loss_of(outcome.problem.spec, precision)
        yield {
            "precision": precision,
            "quality_loss": percent(loss.log_ratio),
            "at_most": percent(loss.log_ratio * loss.factor),
            "source": loss.source,
        }


def _error(outcome: Outcome) -> float:
    """Relative, of predicted times: that of the least sure constants in use."""
    return max(
        segment.group.variants[number].cost.error
        for choice in outcome.choices
        for segment, number in zip(choice.chain.segments, choice.operation.variants, strict=True)
    )


def _replica(choice: Choice, operation: Operation) -> dict[str, Any]:
    return {
        "role": choice.chain.role,
        "moved_s": choice.chain.moved_s,
        "requests_per_s": choice.rate_per_s,
        "quality_loss": percent(choice.log_loss),
        "ttft_s": operation.ttft_s,
        "tpot_s": operation.tpot_s,
        "sequences": operation.num_sequences,
        "micro_batches": operation.num_micro_batches,
        "batch": operation.batch,
        "hops_s": choice.chain.hops.step_s(operation.batch),
        "stages": _stages(choice, operation),
    }


def _stages(choice: Choice, operation: Operation) -> list[dict[str, Any]]:
    rows = []
    goal = choice.chain.goal
    parts = zip(
        choice.chain.segments,
        stacked(operation.layers),
        operation.variants,
        choice.chain.ends,
        strict=True,
    )
    for segment, layers, number, ends in parts:
        variant = segment.group.variants[number]
        step = variant.layer_time(operation.batch).times(len(layers))
        if ends[1]:
            step = step + variant.end_time(operation.batch)
        else:
            step = replace(step, overhead_s=step.overhead_s + variant.step_s)
        prompts = operation.batch / goal.output_tokens * len(layers) * variant.prompt_layer_s
        if choice.chain.role == "prefill":
            step, prompts = StepTime(), len(layers) * variant.prompt_layer_s
        elif choice.chain.role == "decode":
            prompts = 0.0
        kinds = dict.fromkeys(each.source for each in variant.cost.constants)
        rows.append(
            {
                "layers": [layers.start, layers.stop],
                "kind": segment.group.kinds,
                "instances": [list(each.names) for each in segment.groups],
                "heads": [len(each) for each in variant.split.heads],
                "ffn": [len(each) for each in variant.split.ffn],
                "precision": variant.precision,
                "weight_bytes": list(variant.weight_budgets(len(layers), *ends)),
                "kv_bytes": list(variant.kv_budgets(len(layers), *ends)),
                "summed_bytes_per_token": _summed_bytes(choice, len(layers), number, ends, segment),
                "memory_s": step.memory_s,
                "compute_s": step.compute_s,
                "overhead_s": step.overhead_s,
                "communication_s": step.communication_s,
                "prompts_s": prompts,
                "constants": [each for each in kinds if each],
            }
        )
    return rows


def _summed_bytes(
    choice: Choice, num_layers: int, number: int, ends: tuple[bool, bool], segment: Segment
) -> int:
    """Of hidden states that ranks sum for a token: after attention and MLP, and the embedding."""
    if len(segment.group.devices) == 1:
        return 0
    numbers = segment.group.variants[number].numbers
    sums = 2 * num_layers + (1 if ends[0] else 0)
    return sums * choice.chain.spec.hidden_size * numbers.activation_bytes


def text(found: Mapping[str, Any], *, explained: bool) -> list[str]:
    """Lines for a terminal."""
    lines = [*_summary(found), "", *_stage_table(found)]
    lines += [f"not met: {each}" for each in found["unmet"]]
    for each in found["left_out"]:
        names = each["devices"]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"left out: {shown} ({each['kind']}): {each['reason']}")
    return lines + (_explanation(found) if explained else [])


def _summary(found: Mapping[str, Any]) -> list[str]:
    num, arriving = len(found["replicas"]), found["arriving_per_s"]
    load = "then" if arriving == found["requests_per_s"] else f"at {arriving:.3g} requests/s"
    load = load if arriving else "of one request alone"
    lines = [
        f"{num} replica{'s' * (num != 1)}, up to {found['requests_per_s']:.3g} requests/s "
        f"({found['tokens_per_s']:,.0f} tokens/s); {load} TTFT {_ms(found['ttft_s'])}, TPOT "
        f"{_ms(found['tpot_s'])} (predicted, +- {found['error']:.0%})"
    ]
    if found["quality_loss"]:
        lines.append(quality_line(found))
    if found["usd_per_hour"] is not None and found["requests_per_s"]:
        per_million = found["usd_per_hour"] / found["tokens_per_s"] / 3600 * 1e6
        lines.append(
            f"{found['usd_per_hour']:.2f} USD/h, {per_million:.2f} USD per million output tokens"
        )
    if found["watts"] is not None and found["tokens_per_s"]:
        joules = found["watts"] / found["tokens_per_s"]
        lines.append(f"{found['watts']:,.0f} W, {joules:.2g} J an output token when all are busy")
    if found["exact"]:
        lines.append("all plans of these devices were looked at")
    elif not found["looked_at"]:
        lines.append(
            "the plan of least latency misses the SLO at that rate; this is the one that carries "
            "most within it"
        )
    else:
        unit = _UNITS[found["objective"]]
        far = "not known how far" if found["gap"] is None else f"at most {found['gap']:.1%}"
        lines.append(
            f"{far} from the best mix of the {found['looked_at']} kinds of replicas looked at "
            f"(bound {found['bound']:.3g} {unit})".replace(" )", ")")
        )
    return lines


def _stage_table(found: Mapping[str, Any]) -> list[str]:
    head = ("replica", "stage", "devices", "layers", "heads", "weights", "GB of each", "KV GB")
    rows: list[tuple[str, ...]] = [head]
    for (first, last), replica in _runs(found["replicas"]):
        name = str(first) if first == last else f"{first}-{last}"
        if replica["role"] != "any":
            name += f" {replica['role']}"
        for index, each in enumerate(replica["stages"]):
            count = len(each["instances"])
            devices = each["kind"] if count == 1 else f"{count} x ({each['kind']})"
            rows.append(
                (
                    name,
                    str(index),
                    devices,
                    "{}-{}".format(*each["layers"]),
                    _sizes(each["heads"]),
                    each["precision"],
                    _gigabytes(each["weight_bytes"]),
                    _gigabytes(each["kv_bytes"]),
                )
            )
            name = ""
    return _aligned(rows)


def _explanation(found: Mapping[str, Any]) -> list[str]:
    lines = ["", "a decode step, or a prompt of a replica that only starts requests, ms"]
    if all(each["role"] == "any" for each in found["replicas"]):
        lines = ["", "a decode step, ms"]
    head = ("replica", "stage", "batch", "memory", "compute", "layers", "sums", "prompts", "total")
    rows: list[tuple[str, ...]] = [head]
    parts = ("memory_s", "compute_s", "overhead_s", "communication_s", "prompts_s")
    for (first, _), replica in _runs(found["replicas"]):
        for index, each in enumerate(replica["stages"]):
            times = [each[part] for part in parts]
            shown = (f"{value * 1e3:.2f}" for value in (*times, sum(times)))
            rows.append((str(first), str(index), str(replica["batch"]), *shown))
        if len(replica["stages"]) == 1:
            continue
        rows.append((str(first), "hops", "", "", "", "", "", "", f"{replica['hops_s'] * 1e3:.2f}"))
    lines += _aligned(rows)
    for (first, _), replica in _runs(found["replicas"]):
        for index, each in enumerate(replica["stages"]):
            if each["summed_bytes_per_token"]:
                lines.append(_sent(first, index, each))
    lines += [_work(first, each) for (first, _), each in _runs(found["replicas"])]
    lines += [bits_line(each) for each in found["precisions"]]
    for source in _constants(found):
        lines.append(f"constants: {source}")
    for each in found["runner_ups"]:
        lines.append(
            f"instead, {each['wish']}: {_staged(each['stages'])}, "
            f"{_change(each['requests_per_s'], found['requests_per_s'])} requests/s, "
            f"{_change(each['tpot_s'], found['tpot_s'])} TPOT, "
            f"{_change(each['ttft_s'], found['ttft_s'])} TTFT{other_quality(each, found)}"
        )
    for each in found["one_more"]:
        lines.append(f"one more {each['kind']}: {each['requests_per_s']:+.3g} requests/s")
    return lines


def _staged(stages: Sequence[int]) -> str:
    """How many replicas of how many stages."""
    counts = Counter(stages)
    shown = " + ".join(f"{count} x {each}" for each, count in counts.items())
    return f"{shown} stage{'s' * (set(counts) != {1})}"


def _work(first: int, replica: Mapping[str, Any]) -> str:
    """What it has to do at one time."""
    if replica["role"] == "prefill":
        return f"replica {first} starts up to {replica['requests_per_s']:.3g} requests/s"
    batches = "1 batch" if replica["micro_batches"] == 1 else f"{replica['micro_batches']} batches"
    lines = f"replica {first}: {replica['sequences']} sequences, in {batches} of {replica['batch']}"
    if replica["role"] == "decode":
        lines += f"; KV of a prompt takes {_ms(replica['moved_s'])} to get here"
    return lines


def _sent(replica: int, index: int, stage: Mapping[str, Any]) -> str:
    """What a ring's rank sends: 2 (n - 1) / n of what is summed."""
    num_ranks, summed = len(stage["heads"]), stage["summed_bytes_per_token"]
    sent = 2 * (num_ranks - 1) / num_ranks * summed
    return (
        f"replica {replica}, stage {index}: sums of {summed / 1e6:.2f} MB a token; each of "
        f"{num_ranks} ranks sends {sent / 1e6:.2f} MB"
    )


def _runs(replicas: Sequence[Any]) -> list[tuple[tuple[int, int], Any]]:
    """Replicas that are alike and follow each other, as one: ((first, last), replica)."""
    runs: list[tuple[tuple[int, int], Any]] = []
    for index, each in enumerate(replicas):
        if runs and _likeness(runs[-1][1]) == _likeness(each):
            runs[-1] = (runs[-1][0][0], index), runs[-1][1]
        else:
            runs.append(((index, index), each))
    return runs


def _likeness(replica: Mapping[str, Any]) -> list[Any]:
    rate = f"{replica['requests_per_s']:.2g}"
    return [
        replica["role"],
        rate,
        *((s["kind"], s["layers"], s["precision"]) for s in replica["stages"]),
    ]


def _constants(found: Mapping[str, Any]) -> list[str]:
    sources = (c for r in found["replicas"] for s in r["stages"] for c in s["constants"])
    return list(dict.fromkeys(sources))


def _change(value: float, base: float) -> str:
    return f"{value / base - 1:+.0%}" if base else "-"


def _sizes(sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes)} x {sizes[0]}" if len(sizes) > 1 else str(sizes[0])
    return ":".join(map(str, sizes))


def _gigabytes(sizes: Sequence[int]) -> str:
    """Of each rank."""
    shown = [f"{each / 1e9:.1f}" for each in sizes]
    if len(set(shown)) == 1:
        return f"{len(shown)} x {shown[0]}" if len(shown) > 1 else shown[0]
    return ":".join(shown)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
