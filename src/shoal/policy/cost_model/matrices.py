"""The weights of a shard as matrices: rows, columns, and how they are kept.

    h hidden   per layer: qkv [own heads + 2 x KV heads, h]   o [h, own heads]
                          gate and up [2 x own columns, h]    down [h, own columns]

Knows nothing of how they are filled; `model/allocation.py` makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Shard
from shoal.policy.cost_model.numbers import (
    GROUP,
    Kept,
    Numbers,
    granule,
    matrix_bytes,
    whole_panels,
)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight: every token is multiplied with all of it."""

    name: str
    rows: int
    columns: int
    size_bytes: int

    @property
    def num_weights(self) -> int:
        return self.rows * self.columns


def layer_matrices(spec: ModelSpec, shard: Shard, layer: int, numbers: Numbers) -> Iterator[Matrix]:
    """Of a layer, but for its experts; those that are empty are left out."""
    hidden, ffn = spec.hidden_size, len(shard.mlp_columns(spec, layer))
    all_heads = spec.num_heads * spec.value_dim
    head_columns = Range(shard.heads.start * spec.value_dim, shard.heads.stop * spec.value_dim)
    o_cut = granule(numbers.of_matrix(all_heads), all_heads)
    found = [
        _matrix("qkv", qkv_rows(spec, shard), hidden, hidden, numbers),
        _matrix("o", hidden, len(head_columns.snapped(o_cut)), all_heads, numbers),
        _matrix("gate_up", 2 * _rows(ffn, numbers), hidden, hidden, numbers),
        _down(spec, ffn, layer, numbers),
    ]
    if (latent := spec.latent) is not None:
        heads = len(shard.heads)
        rank = latent.query_rank or 0
        kv_rows = heads * (latent.plain_dim + latent.value_dim)
        found += [
            _matrix("latent_q", heads * spec.head_dim, rank, rank, numbers),
            _matrix("latent_kv", kv_rows, latent.kv_rank, latent.kv_rank, numbers),
        ]
    return (each for each in found if each.size_bytes)


def expert_matrices(spec: ModelSpec, numbers: Numbers) -> tuple[Matrix, ...]:
    """Of one expert."""
    assert spec.experts is not None
    hidden, ffn = spec.hidden_size, spec.experts.ffn_size
    return (
        _matrix("expert_gate_up", 2 * _rows(ffn, numbers), hidden, hidden, numbers),
        _matrix("expert_down", hidden, ffn, ffn, numbers),
    )


def table(spec: ModelSpec, shard: Shard, name: str, numbers: Numbers) -> Matrix:
    """The shard's rows of the embedding or the head."""
    columns = spec.hidden_size
    kept = numbers.of_table(columns)
    return _kept_matrix(name, len(shard.vocab), columns, granule(kept, columns), kept, numbers)


def _down(spec: ModelSpec, ffn: int, layer: int, numbers: Numbers) -> Matrix:
    whole = spec.mlp_size(layer)
    kept = numbers.of_matrix(whole)
    cut = granule(kept, whole)
    if spec.layers[layer].has_experts:
        cut = min(cut, GROUP)  # where columns beside experts are cut
    return _kept_matrix("down", spec.hidden_size, ffn, cut, kept, numbers)


def _matrix(name: str, rows: int, columns: int, whole_columns: int, numbers: Numbers) -> Matrix:
    kept = numbers.of_matrix(whole_columns)
    return _kept_matrix(name, rows, columns, granule(kept, whole_columns), kept, numbers)


def _kept_matrix(
    name: str, rows: int, columns: int, cut: int, kept: Kept, numbers: Numbers
) -> Matrix:
    size = matrix_bytes(kept, rows, columns, cut, packed=numbers.packed)
    return Matrix(name, rows, columns, size)


def _rows(ffn: int, numbers: Numbers) -> int:
    return whole_panels(ffn) if numbers.packed else ffn


def qkv_rows(spec: ModelSpec, shard: Shard) -> int:
    """Of queries, keys and values together, or of the latents that they are made from."""
    heads = len(shard.heads)
    if spec.latent is None:
        return (heads + 2 * len(shard.kv_heads(spec))) * spec.head_dim
    queries = spec.latent.query_rank or heads * spec.head_dim
    return queries + spec.latent.kv_rank + spec.latent.rope_dim if heads else 0
