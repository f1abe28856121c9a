"""What a replica can carry, from what its workers said when they were loaded.

KV blocks of an instance are the fewest of its ranks, or all of theirs together where each keeps
its own (token ranges); of a route, the fewest of its instances, and that stage binds. Knows nothing
of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan, Route
from shoal.core.split import Range
from shoal.core.step import BLOCK_SIZE
from shoal.wire.worker_messages import LinkFacts, Loaded
from shoal.worker.capacity import settle_max_model_len, size_text, useful_blocks

Facts = Mapping[tuple[int, int], Loaded]
"""By instance and rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What an engine must know of its workers.

    Attributes:
        instance_blocks: KV blocks of each instance.
        rank_blocks: of each instance, how many of them each rank has, one after another; empty
            where every rank has its heads of all.
        block_bytes: of a KV block over all layers, on the roomiest route; 0: KV split by token
            ranges, which stays where it is.
        max_model_len: tokens of one request at most.
        device, device_type, dtype: for people, and for defaults.
        digest: what, beside the checkpoint, the bytes of the KV follow from.
        kv_kinds: the same of each instance; "" where its KV stays.
        lines: the same for people, worker by worker.
    """

    instance_blocks: tuple[int, ...]
    rank_blocks: tuple[tuple[int, ...], ...]
    block_bytes: int
    max_model_len: int
    device: str
    device_type: str
    dtype: str
    digest: str
    lines: tuple[str, ...]
    kv_kinds: tuple[str, ...] = ()


def settle(replica: ReplicaPlan, options: EngineOptions, spec: ModelSpec, facts: Facts) -> Capacity:
    """
    Raises:
        ConfigError: --max-model-len is more than any route holds.
    """
    blocks = _instance_blocks(replica, options, spec, facts)
    route = max(replica.routes, key=lambda each: _room(each, blocks))
    binding = min((hop.instance for hop in route), key=lambda instance: blocks[instance])
    where = f"instance {binding} of stage {replica.stage_of(binding)}"
    max_model_len = settle_max_model_len(options, spec, blocks[binding], where)
    kinds = [facts[key] for key in sorted(facts)]
    return Capacity(
        instance_blocks=blocks,
        rank_blocks=tuple(
            rank_blocks(replica, instance, _ranks_of(facts, instance))
            for instance in range(len(replica.instances))
        ),
        block_bytes=_block_bytes(replica, route, facts),
        max_model_len=max_model_len,
        device=", ".join(dict.fromkeys(each.device for each in kinds)),
        device_type="cuda" if all(each.device_type == "cuda" for each in kinds) else "cpu",
        dtype=", ".join(dict.fromkeys(each.dtype for each in kinds)),
        digest="+".join(dict.fromkeys(each.digest for each in kinds)),
        kv_kinds=tuple(
            _kv_kind(replica, _ranks_of(facts, instance))
            for instance in range(len(replica.instances))
        ),
        lines=(
            *(_worker_line(replica, spec, key, facts[key]) for key in sorted(facts)),
            *(
                f"{replica.worker_name(*k):<10} {facts[k].disk}"
                for k in sorted(facts)
                if facts[k].disk
            ),
            f"KV cache   {blocks[binding] * BLOCK_SIZE:,} tokens, bound by {where}: "
            f"{blocks[binding] * BLOCK_SIZE // max_model_len} requests of {max_model_len:,} "
            "tokens at once",
        ),
    )


def rank_blocks(replica: ReplicaPlan, instance: int, ranks: Sequence[Loaded]) -> tuple[int, ...]:
    """KV blocks that each rank of an instance has to itself; empty: all have the same ones."""
    split = replica.instances[instance].split
    if split.kv != "tokens" or split.num_ranks == 1:
        return ()
    counts = [each.num_blocks for each in ranks]
    return tuple(count for count in counts if count is not None)


def links_line(links: Sequence[tuple[str, LinkFacts]]) -> str:
    """For people: what links between workers (sender, and facts) give, the slowest by name."""
    sender, slowest = max(links, key=lambda link: link[1].latency_s)
    narrow_sender, narrowest = min(links, key=lambda link: link[1].bandwidth_bytes_per_s)
    interfaces = ", ".join(sorted({link.interface for _, link in links}))
    return (
        f"links      {len(links)} over {interfaces}; measured at most "
        f"{slowest.latency_s * 1e6:.0f} us ({sender} to {slowest.peer}), at least "
        f"{narrowest.bandwidth_bytes_per_s * 8 / 1e6:,.0f} Mbit/s "
        f"({narrow_sender} to {narrowest.peer})"
    )


def _instance_blocks(
    replica: ReplicaPlan, options: EngineOptions, spec: ModelSpec, facts: Facts
) -> tuple[int, ...]:
    found: dict[int, int] = {}
    for (instance, _rank), each in facts.items():
        if each.num_blocks is not None:
            found[instance] = min(each.num_blocks, found.get(instance, each.num_blocks))
    for instance in found:
        if own := rank_blocks(replica, instance, _ranks_of(facts, instance)):
            found[instance] = sum(own)
    # One that keeps no KV (it only embeds, say) never binds.
    unbounded = max(useful_blocks(options, spec), *found.values(), 1)
    return tuple(found.get(i, unbounded) for i in range(len(replica.instances)))


def _kv_kind(replica: ReplicaPlan, ranks: Sequence[Loaded]) -> str:
    """What the bytes of an instance's KV follow from; "" if it cannot be copied to another."""
    digests = {each.digest for each in ranks if each.num_blocks is not None}
    stays = any(each.split.kv == "tokens" for each in replica.instances)
    return "" if stays or len(digests) != 1 else digests.pop()


def _ranks_of(facts: Facts, instance: int) -> list[Loaded]:
    return [facts[key] for key in sorted(facts) if key[0] == instance]


def _block_bytes(replica: ReplicaPlan, route: Route, facts: Facts) -> int:
    instances = [hop.instance for hop in route]
    if any(replica.instances[instance].split.kv == "tokens" for instance in instances):
        return 0
    ranks = (each for instance in instances for each in _ranks_of(facts, instance))
    return sum(each.kv_bytes // each.num_blocks for each in ranks if each.num_blocks)


def _room(route: Route, blocks: tuple[int, ...]) -> int:
    return min(blocks[hop.instance] for hop in route)


def _worker_line(replica: ReplicaPlan, spec: ModelSpec, key: tuple[int, int], found: Loaded) -> str:
    shard = replica.shards(key[0])[key[1]]
    parts = [f"layers {_text(shard.layers)}"]
    if shard.num_ranks > 1:
        parts += [f"heads {_text(shard.heads)}", f"ffn {_text(shard.ffn)}"]
    parts += [f"{size_text(found.weight_bytes)} in {found.dtype}", found.device]
    tokens = None if found.num_blocks is None else found.num_blocks * BLOCK_SIZE
    parts.append("no KV" if tokens is None else f"KV of {tokens:,} tokens")
    return f"{replica.worker_name(*key):<10} {', '.join(parts)}"


def _text(each: Range) -> str:
    return f"{each.start}-{each.stop}" if len(each) else "none"
