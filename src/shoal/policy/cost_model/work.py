"""What a shard reads and computes in a Step.

    products    every matrix is read once, and multiplied with every token: 2 flops a weight
    experts     of E, each token goes through k; T tokens touch E (1 - (1 - k/E)^T) of them
    attention   KV positions read x bytes; pairs x 2 x heads x (key size + value size)
    head        only rows that sample

The input embedding is not read: a row for each token is nothing. Prefill's flops are then
2 P n + 2 L h n^2 / 2 x 2 as in Mooncake (arXiv 2407.00079, eq. 1). Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.core.model_spec import ModelSpec
from shoal.core.split import WHOLE_SHARE, Shard
from shoal.policy.cost_model.loads import StepLoad, Windows, windows_of
from shoal.policy.cost_model.matrices import expert_matrices, layer_matrices, table
from shoal.policy.cost_model.memory import kv_token_bytes
from shoal.policy.cost_model.numbers import Numbers


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes and flops of kernels that run one after the other with the next part."""

    size_bytes: float
    flops: float
    is_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWork:
    """A shard, summed up over its layers.

    Attributes:
        dense_bytes, dense_weights: of what every token goes through.
        head_bytes, head_weights: of the head.
        num_experts: that it has, counted in every layer.
        expert_bytes, expert_weights: of one of them.
        num_active, num_all: experts that a token goes through, and those there are.
        expert_share: of a layer's expert work that is this rank's, summed over layers.
        layers_by_window: how many of its layers have each of the model's windows.
        kv_layer_bytes: of a token's KV in one layer, as this shard reads it.
        pair_flops: of attention, for one pair in one layer.
    """

    num_layers: int
    dense_bytes: int
    dense_weights: int
    head_bytes: int
    head_weights: int
    num_experts: int
    expert_bytes: int
    expert_weights: int
    num_active: int
    num_all: int
    expert_share: float
    windows: Windows
    layers_by_window: tuple[int, ...]
    kv_layer_bytes: float
    pair_flops: float

    def parts(self, load: StepLoad) -> Iterator[Part]:
        """What a Step takes, kernel by kernel.

        Args:
            load: by the windows of the same model.
        """
        tokens, sampled = load.num_tokens, load.num_sampled
        yield Part(self.dense_bytes, 2.0 * tokens * self.dense_weights)
        if self.num_experts:
            untouched = (1 - self.num_active / self.num_all) ** tokens
            products = tokens * self.num_active * self.expert_share
            yield Part(
                self.num_experts * (1 - untouched) * self.expert_bytes,
                2.0 * products * self.expert_weights,
            )
        if self.head_bytes and sampled:
            yield Part(self.head_bytes, 2.0 * sampled * self.head_weights)
        reads = sum(n * each for n, each in zip(self.layers_by_window, load.kv_tokens, strict=True))
        pairs = sum(n * each for n, each in zip(self.layers_by_window, load.pairs, strict=True))
        yield Part(reads * self.kv_layer_bytes, pairs * self.pair_flops, is_attention=True)


def shard_work(spec: ModelSpec, shard: Shard, numbers: Numbers) -> ShardWork:
    """Sums over the layers of a shard; tokens are taken to spread evenly over experts."""
    layers = range(shard.layers.start, shard.layers.stop)
    alike = _alike(spec, shard, numbers)
    dense = [alike[_layer_kind(spec, layer)] for layer in layers]
    experts = expert_matrices(spec, numbers) if spec.experts else ()
    head = table(spec, shard, "head", numbers) if shard.has_head else None
    windows = windows_of(spec)
    counts = [sum(spec.layers[layer].window == each for layer in layers) for each in windows]
    heads = spec.num_heads / shard.num_ranks if shard.has_token_ranges else len(shard.heads)
    mixed = [layer for layer in layers if spec.layers[layer].has_experts]
    shares = [share for layer in mixed for share in shard.experts_of(layer)]
    num_all = spec.experts.num_experts if spec.experts else 1
    widths = sum(share.stop - share.start for share in shares)
    return ShardWork(
        num_layers=len(layers),
        dense_bytes=sum(size for size, _ in dense),
        dense_weights=sum(weights for _, weights in dense),
        head_bytes=head.size_bytes if head else 0,
        head_weights=head.num_weights if head else 0,
        num_experts=len(shares),
        expert_bytes=sum(each.size_bytes for each in experts),
        expert_weights=sum(each.num_weights for each in experts),
        num_active=spec.experts.num_active if spec.experts else 0,
        num_all=num_all,
        expert_share=widths / WHOLE_SHARE / num_all,
        windows=windows,
        layers_by_window=tuple(counts),
        kv_layer_bytes=_kv_layer_bytes(spec, shard, numbers),
        pair_flops=2.0 * heads * (spec.head_dim + spec.value_dim),
    )


def _layer_kind(spec: ModelSpec, layer: int) -> bool:
    """What the sizes of a layer's matrices depend on."""
    return spec.layers[layer].has_experts


def _alike(spec: ModelSpec, shard: Shard, numbers: Numbers) -> dict[bool, tuple[int, int]]:
    """Bytes and weights of one layer of each kind that the shard has."""
    found: dict[bool, tuple[int, int]] = {}
    for layer in range(shard.layers.start, shard.layers.stop):
        kind = _layer_kind(spec, layer)
        if kind not in found:
            matrices = tuple(layer_matrices(spec, shard, layer, numbers))
            size = sum(each.size_bytes for each in matrices)
            found[kind] = size, sum(each.num_weights for each in matrices)
    return found


def _kv_layer_bytes(spec: ModelSpec, shard: Shard, numbers: Numbers) -> float:
    """Of one token; where KV is split by tokens, each rank reads its part of the tokens."""
    if not len(shard.layers):
        return 0.0
    size = kv_token_bytes(spec, shard, numbers) / len(shard.layers)
    return size / shard.num_ranks if shard.has_token_ranges else size
