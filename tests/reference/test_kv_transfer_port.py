"""KV goes from workers to workers that are cut otherwise, over real sockets, byte by byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue

import pytest
import torch

from shoal.core.kv import KVSource
from shoal.core.split import Range
from shoal.kernels import KVCache, LayerKV
from shoal.wire.curve import make_keys
from shoal.wire.mesh import Mesh, Payload
from shoal.wire.worker_messages import DropPull, EndLease, LendBlocks, PullBlocks, StopPull
from shoal.worker import lender, transfer
from shoal.worker.kv_bytes import bytes_of
from shoal.worker.transfer import KVPort

NUM_LAYERS, NUM_HEADS, HEAD_DIM, NUM_BLOCKS = 6, 3, 8, 40
NAMES = ("lender-0", "lender-1", "borrower")
BORROWED = tuple(range(30, 5, -1))
LENT = tuple(range(2, 2 + len(BORROWED)))
PIECE = 6
"""Blocks in a piece, in fp32."""
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


class DamagingMesh(Mesh):
    """Changes one bit of a payload, after the checksum was taken of it."""

    damage_after = 0

    def send(self, peer: str, header: bytes, payload: Payload = b"") -> None:
        if payload:
            self.damage_after -= 1
            if self.damage_after == 0:
                payload = bytearray(payload)
                payload[len(payload) // 2] ^= 16
        super().send(peer, header, payload)


class Side:
    """A worker: its cache, its port, and a loop that does what is posted between Steps."""

    def __init__(
        self, mesh: Mesh, layers: Range, heads: Range, dtype: torch.dtype, heads_first: bool
    ) -> None:
        self.layers, self.heads, self.heads_first = layers, heads, heads_first
        self.cache = random_cache(len(layers), len(heads), dtype)
        self.chores: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.reports: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self.port = KVPort(
            self.cache,
            layers,
            heads,
            mesh,
            heads_first=heads_first,
            post=self.chores.put,
            report=lambda *report: self.reports.put(report),
        )
        self.port.start()
        self.loop = threading.Thread(target=self.run)
        self.loop.start()

    def run(self) -> None:
        while (chore := self.chores.get()) is not None:
            chore()

    def source(self, name: str) -> KVSource:
        return KVSource(name, self.port.address, self.layers, self.heads)

    def pull(self, sources: list[KVSource]) -> int:
        """How many blocks are whole."""
        self.begin(sources)
        pull_id, num_blocks = self.reports.get(timeout=60)
        assert pull_id == 5
        return num_blocks

    def begin(self, sources: list[KVSource]) -> None:
        order = PullBlocks(5, 7, 0, tuple(sources), self.layers, BORROWED)
        self.chores.put(partial(self.port.take, order))


def random_cache(num_layers: int, num_heads: int, dtype: torch.dtype) -> KVCache:
    shape = (NUM_BLOCKS, 16, num_heads, HEAD_DIM)

    def numbers() -> torch.Tensor:
        return torch.randint(0, 100, shape).to(dtype)

    def scales() -> torch.Tensor | None:
        return torch.randn(shape[:-1]) if dtype.itemsize == 1 else None

    return KVCache(
        tuple(LayerKV(numbers(), numbers(), scales(), scales()) for _ in range(num_layers))
    )


@contextmanager
def three_sides(
    dtype: torch.dtype, *, lender: type[Mesh] = Mesh, heads_first: bool = False
) -> Iterator[list[Side]]:
    """Lenders cut by heads, with one head on both; a borrower with some layers and heads of it."""
    keys = make_keys(NAMES)
    meshes = [lender(keys[NAMES[0]]), Mesh(keys[NAMES[1]]), Mesh(keys[NAMES[2]])]
    sides = [
        Side(meshes[0], Range(0, NUM_LAYERS), Range(0, 2), dtype, heads_first),
        Side(meshes[1], Range(0, NUM_LAYERS), Range(1, 3), dtype, heads_first),
        Side(meshes[2], Range(2, 5), Range(0, 3), dtype, heads_first),
    ]
    try:
        yield sides
    finally:
        for side in sides:
            side.chores.put(None)
            side.loop.join()
            side.port.close()


def layer_bytes(side: Side, layer: int, head: int, block: int) -> list[torch.Tensor]:
    """Of one head; where heads come first, as the compiled kernels number what is in a block."""
    kept = side.cache.layers[layer - side.layers.start]
    at = head - side.heads.start
    tensors = [kept.keys_NBHD, kept.values_NBHD, kept.key_scales_NBH, kept.value_scales_NBH]
    found = [each[block] for each in tensors if each is not None]
    if not side.heads_first:
        return [each[:, at].contiguous().view(torch.uint8) for each in found]
    size = len(side.heads)
    return [each.view(torch.uint8).flatten().chunk(size)[at] for each in found]


def equal_blocks(lenders: list[Side], borrower: Side) -> list[bool]:
    """Of each block that was pulled, whether all its layers and heads are those of the lenders."""
    of_head = {head: side for side in reversed(lenders) for head in range(*span(side.heads))}
    return [
        all(
            torch.equal(ours, theirs)
            for layer in range(*span(borrower.layers))
            for head in range(*span(borrower.heads))
            for ours, theirs in zip(
                layer_bytes(borrower, layer, head, got),
                layer_bytes(of_head[head], layer, head, lent),
                strict=True,
            )
        )
        for got, lent in zip(BORROWED, LENT, strict=True)
    ]


def span(each: Range) -> tuple[int, int]:
    return each.start, each.stop


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks or so at a time."""
    monkeypatch.setattr(transfer, "_PIECE_BYTES", 20_000)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_arrive_bit_by_bit_whatever_the_cut(dtype: torch.dtype, heads_first: bool) -> None:
    with three_sides(dtype, heads_first=heads_first) as (first, second, borrower):
        for side in (first, second):
            side.port.lend(LendBlocks(7, LENT, len(LENT)))
        kept = [each.clone() for each in bytes_of(borrower.cache.layers[0], False)]
        sources = [first.source(NAMES[0]), second.source(NAMES[1])]
        assert borrower.pull(sources) == len(BORROWED)
        assert all(equal_blocks([first, second], borrower))
        others = [block for block in range(NUM_BLOCKS) if block not in BORROWED]
        now = bytes_of(borrower.cache.layers[0], False)
        assert all(torch.equal(a[others], b[others]) for a, b in zip(kept, now, strict=True))


def test_a_lease_may_be_asked_for_before_it_is_known() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        borrower.begin([first.source(NAMES[0]), second.source(NAMES[1])])
        time.sleep(0.1)
        for side in (first, second):
            side.port.lend(LendBlocks(7, LENT, len(LENT)))
        assert borrower.reports.get(timeout=60) == (5, len(BORROWED))
        assert all(equal_blocks([first, second], borrower))


def lend(sides: list[Side], num_ready: int, num_blocks: int = len(LENT)) -> None:
    for side in sides:
        side.port.lend(LendBlocks(7, LENT[:num_blocks], num_ready))


def wait_for_blocks(sides: list[Side], borrower: Side, num_blocks: int) -> None:
    end = time.monotonic() + 60
    while equal_blocks(sides, borrower)[:num_blocks] != [True] * num_blocks:
        assert time.monotonic() < end, f"{num_blocks} blocks did not come"
        time.sleep(0.01)


def test_what_is_asked_for_ahead_is_sent_as_it_becomes_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "_SILENCE_S", 2.0)
    monkeypatch.setattr(lender, "_SAY_LATER_EVERY_S", 0.1)
    with three_sides(torch.float32) as (first, second, borrower):
        lenders = [first, second]
        lend(lenders, 0)
        borrower.begin([first.source(NAMES[0]), second.source(NAMES[1])])
        time.sleep(2.5)  # its lenders say that it is still to come
        assert borrower.reports.empty()
        assert not any(equal_blocks(lenders, borrower))
        lend(lenders, PIECE)
        wait_for_blocks(lenders, borrower, PIECE)
        lend(lenders, 2 * PIECE + 1)
        wait_for_blocks(lenders, borrower, 2 * PIECE)
        assert borrower.reports.empty()
        lend(lenders, len(LENT))
        assert borrower.reports.get(timeout=60) == (5, len(BORROWED))
        assert all(equal_blocks(lenders, borrower))


def test_what_is_never_computed_ends_a_pull() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        lenders = [first, second]
        lend(lenders, 1)
        borrower.begin([first.source(NAMES[0]), second.source(NAMES[1])])
        lend(lenders, PIECE + 2, PIECE + 2)
        assert borrower.reports.get(timeout=60) == (5, PIECE)
        assert all(equal_blocks(lenders, borrower)[:PIECE])


def test_a_pull_that_is_stopped_says_what_is_whole() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        lenders = [first, second]
        lend(lenders, PIECE)
        borrower.begin([first.source(NAMES[0]), second.source(NAMES[1])])
        wait_for_blocks(lenders, borrower, PIECE)
        # All of it was written, but for what the last of it told the loop.
        borrower.chores.put(partial(borrower.port.take, StopPull(5)))
        assert borrower.reports.get(timeout=60) == (5, PIECE)
        lend(lenders, len(LENT))
        time.sleep(0.3)
        assert borrower.reports.empty()
        assert not any(equal_blocks(lenders, borrower)[PIECE:])


def test_a_labs_links_are_kv_s_too() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        lenders = [first, second]
        second.port._mesh.set_link(NAMES[2], cut=True)
        lend(lenders, len(LENT))
        borrower.begin([first.source(NAMES[0]), second.source(NAMES[1])])
        time.sleep(0.5)
        assert borrower.reports.empty()
        second.port._mesh.set_link(NAMES[2], bandwidth_bytes_per_s=10e6)
        assert borrower.reports.get(timeout=60) == (5, len(BORROWED))
        assert all(equal_blocks(lenders, borrower))


def test_a_damaged_piece_ends_the_pull_before_it() -> None:
    with three_sides(torch.float32, lender=DamagingMesh) as (first, second, borrower):
        first.port._mesh.damage_after = 10  # type: ignore[attr-defined]
        for side in (first, second):
            side.port.lend(LendBlocks(7, LENT, len(LENT)))
        num_whole = borrower.pull([first.source(NAMES[0]), second.source(NAMES[1])])
        assert num_whole == 3 * PIECE, "it sends three layers, so its tenth piece is of the fourth"
        assert all(equal_blocks([first, second], borrower)[:num_whole])


def test_a_lease_that_ended_is_read_no_more() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        for side in (first, second):
            side.port.lend(LendBlocks(7, LENT, len(LENT)))
            side.chores.put(partial(side.port.take, EndLease(7)))
        time.sleep(0.1)
        assert borrower.pull([first.source(NAMES[0]), second.source(NAMES[1])]) == 0


def test_a_layer_or_head_that_nobody_has_is_noticed_at_once() -> None:
    with three_sides(torch.float32) as (first, _second, borrower):
        assert borrower.pull([first.source(NAMES[0])]) == 0


def test_a_lender_that_says_nothing_is_given_up() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        first.port.lend(LendBlocks(7, LENT, len(LENT)))
        silent = KVSource(NAMES[1], "tcp://127.0.0.1:9 tcp://127.0.0.1:9", *span_of(second))
        started_s = time.monotonic()
        assert borrower.pull([first.source(NAMES[0]), silent]) == 0
        assert time.monotonic() - started_s >= transfer._SILENCE_S


def test_a_pull_that_was_dropped_writes_nothing_more() -> None:
    with three_sides(torch.float32) as (first, second, borrower):
        borrower.begin([first.source(NAMES[0]), second.source(NAMES[1])])
        borrower.chores.put(partial(borrower.port.take, DropPull(5)))
        done = threading.Event()
        borrower.chores.put(done.set)
        assert done.wait(60)
        kept = [each.clone() for each in bytes_of(borrower.cache.layers[0], False)]
        for side in (first, second):
            side.port.lend(LendBlocks(7, LENT, len(LENT)))
        time.sleep(0.3)
        now = bytes_of(borrower.cache.layers[0], False)
        assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
        assert borrower.reports.empty()


def span_of(side: Side) -> tuple[Range, Range]:
    return side.layers, side.heads
