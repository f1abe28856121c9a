"""How the reference attention cuts a ragged batch into rectangles, decided once per batch.

Rows with the same number of new tokens (all rows that decode, above all) are stacked and padded
to the longest; a row too large for one score matrix is cut along its queries:

    rows       decode 1  decode 1  decode 1  prefill 300 (long)
    rectangles [ R=3, Q=1, L=longest ]       [ R=1, Q=180, L ] [ R=1, Q=120, L' ]

Keys are those that are here (`HeldBlocks`), without gaps. Knows the host's lists and index
arithmetic; computes no attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shoal.kernels.batch import RaggedBatch

MAX_SCORES = 2**22
"""Scores in one rectangle at most (16 MiB in fp32): bounds memory whatever the context."""

_SHORT_CONTEXT = 256


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """One rectangle: R rows of Q queries, each row over its own L keys.

    Attributes:
        tokens: [R*Q] int64, its tokens among all T.
        cache_rows: [R*H*L] int64, rows of the cache seen as [N*B*H, D].
        hidden_RQL: bool, scores to leave out (padding, future, beyond the window); None: none.
    """

    num_rows: int
    num_queries: int
    num_keys: int
    tokens: torch.Tensor
    cache_rows: torch.Tensor
    hidden_RQL: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive queries of one row, and the keys that any of them sees; at least one."""

    row: int
    first_token: int
    first_position: int
    num_queries: int
    first_key: int
    num_keys: int


def plan_attention(
    batch: RaggedBatch,
    window: int | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
) -> list[AttentionPlan]:
    """Rectangles that cover every token of the batch once.

    A single rectangle covers all tokens in their order.
    """
    pieces = list(_pieces(batch, window, num_heads, block_size))
    groups = _stack(pieces, num_heads)
    return [_rectangle(batch, group, window, num_kv_heads, block_size) for group in groups]


def _pieces(
    batch: RaggedBatch, window: int | None, num_heads: int, block_size: int
) -> Iterator[_Piece]:
    token = 0
    for row, (query_len, context_len) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        position, end = context_len - query_len, token + query_len
        _, num_keys = _seen(batch, row, position, context_len, window, block_size)
        most = max(1, MAX_SCORES // (num_heads * num_keys))
        # Equal pieces: a sliver would cost as many operations as a full one.
        size = -(-query_len // -(-query_len // most))
        while token < end:
            some = min(size, end - token)
            keys = _seen(batch, row, position, position + some, window, block_size)
            yield _Piece(row, token, position, some, *keys)
            token, position = token + some, position + some


def _seen(
    batch: RaggedBatch, row: int, start: int, stop: int, window: int | None, block_size: int
) -> tuple[int, int]:
    """First key, and number of keys, that queries at positions [start, stop) of a row see."""
    oldest = 0 if window is None else max(0, start - window + 1)
    if batch.held is None:
        return oldest, stop - oldest
    first, end = (batch.held.num_keys(row, each, block_size) for each in (oldest, stop))
    return first, max(1, end - first)


def _stack(pieces: list[_Piece], num_heads: int) -> list[list[_Piece]]:
    """Groups of equally many queries whose padding wastes at most half."""
    if _fits(pieces, num_heads):
        return [pieces]
    groups: list[list[_Piece]] = []
    by_shape = sorted(pieces, key=lambda each: (each.num_queries, each.num_keys))
    for piece in reversed(by_shape):
        if groups and _fits([*groups[-1], piece], num_heads):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _fits(pieces: list[_Piece], num_heads: int) -> bool:
    num_queries = pieces[0].num_queries
    if any(each.num_queries != num_queries for each in pieces):
        return False
    num_keys = [each.num_keys for each in pieces]
    longest = max(num_keys)
    if len(pieces) > 1 and len(pieces) * num_heads * num_queries * longest > MAX_SCORES:
        return False
    return longest <= _SHORT_CONTEXT or longest <= 2 * min(num_keys)


def _rectangle(
    batch: RaggedBatch,
    pieces: list[_Piece],
    window: int | None,
    num_kv_heads: int,
    block_size: int,
) -> AttentionPlan:
    device = batch.block_tables_RB.device
    num_queries = pieces[0].num_queries
    num_keys = max(each.num_keys for each in pieces)
    # One upload for the rectangle; everything else is computed where it is used.
    columns = [[p.row, p.first_token, p.first_position, p.first_key] for p in pieces]
    row, token, position, first_key = torch.tensor(columns, device=device).unbind(1)
    queries = torch.arange(num_queries, device=device)
    key_RL = first_key[:, None] + torch.arange(num_keys, device=device)
    cache_rows = _cache_rows(batch, row, key_RL, num_kv_heads, block_size)
    hidden_RQL = None
    is_ragged = any(each.num_keys != num_keys for each in pieces)
    if num_queries > 1 or is_ragged or batch.held is not None:
        query_RQ1 = (position[:, None] + queries)[:, :, None]
        key_R1L = _positions(batch, row, key_RL, block_size)[:, None, :]
        hidden_RQL = key_R1L > query_RQ1
        if window is not None:
            hidden_RQL |= key_R1L <= query_RQ1 - window
    return AttentionPlan(
        num_rows=len(pieces),
        num_queries=num_queries,
        num_keys=num_keys,
        tokens=(token[:, None] + queries).flatten(),
        cache_rows=cache_rows,
        hidden_RQL=hidden_RQL,
    )


def _cache_rows(
    batch: RaggedBatch,
    row: torch.Tensor,
    key_RL: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
) -> torch.Tensor:
    """Rows of the cache seen as [N*B*H, D], ordered [R, H, L]."""
    block_RL = _of_blocks(batch.block_tables_RB[row], key_RL, block_size)
    slot_RL = block_RL * block_size + key_RL % block_size
    heads = torch.arange(num_kv_heads, device=key_RL.device)
    return (slot_RL[:, None, :] * num_kv_heads + heads[:, None]).flatten()


def _positions(
    batch: RaggedBatch, row: torch.Tensor, key_RL: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Where in their sequences keys are."""
    if batch.held is None:
        return key_RL
    index_RL = _of_blocks(batch.held.indices_RB[row], key_RL, block_size)
    return index_RL * block_size + key_RL % block_size


def _of_blocks(table_RB: torch.Tensor, key_RL: torch.Tensor, block_size: int) -> torch.Tensor:
    """What a table says of the keys' blocks.

    Padding runs past a short row's table; what it reads there is hidden.
    """
    return table_RB.gather(1, (key_RL // block_size).clamp_(max=table_RB.shape[1] - 1))
