"""What a plan runs, as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.plan import RankPlan, ReplicaPlan
from shoal.core.split import Range, Shard

_HEADINGS = ("worker", "device", "layers", "heads", "ffn", "vocabulary", "experts")


def plan_table(replicas: Sequence[ReplicaPlan]) -> list[str]:
    """A line about all of it, then one for each worker; equal replicas are shown once."""
    lines = [f"plan       {_summary(replicas)}"]
    shown = replicas[:1] if len(set(replicas)) == 1 else replicas
    for index, replica in enumerate(shown):
        role = f" ({replica.role})" if replica.role != "any" else ""
        prefix = f"{index}{role}: " if len(shown) > 1 else ""
        rows = [_HEADINGS, *_rows(replica, prefix)]
        has_experts = any(row[-1] != "-" for row in rows[1:])
        lines += _aligned(rows if has_experts else [row[:-1] for row in rows])
    return lines


def _summary(replicas: Sequence[ReplicaPlan]) -> str:
    num_workers = sum(len(each.ranks) for replica in replicas for each in replica.instances)
    parts = [
        (len(replicas), "replica"),
        (max(len(replica.stages) for replica in replicas), "stage"),
        (max(len(replica.routes) for replica in replicas), "route"),
        (num_workers, "worker"),
    ]
    return ", ".join(_counted(*part) for part in parts)


def _rows(replica: ReplicaPlan, prefix: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, instance in enumerate(replica.instances):
        for rank, (each, shard) in enumerate(
            zip(instance.ranks, replica.shards(number), strict=True)
        ):
            has_vocabulary = shard.has_embedding or shard.has_head
            rows.append(
                (
                    prefix + replica.worker_name(number, rank),
                    _device(each, instance.quantize or instance.dtype),
                    _shown(shard.layers),
                    _shown(shard.heads),
                    _shown(shard.ffn),
                    _shown(shard.vocab) if has_vocabulary else "-",
                    _experts(shard),
                )
            )
    return rows


def _device(rank: RankPlan, precision: str | None) -> str:
    words = [rank.device]
    if rank.num_threads is not None:
        words.append(_counted(rank.num_threads, "thread"))
    if rank.host is not None:
        words.append(f"on {rank.host}")
    if rank.speed != 1.0:
        words.append(f"at {rank.speed:g}")
    if precision is not None:
        words.append(precision)
    return " ".join(words)


def _experts(shard: Shard) -> str:
    """How many it has, in whole or in part, of a layer."""
    counts = {len(shares) for shares in shard.experts}
    if not any(counts):
        return "none" if counts else "-"
    return str(*counts) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _shown(each: Range) -> str:
    return f"{each.start}-{each.stop}" if len(each) else "-"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
