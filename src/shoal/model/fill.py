"""Fills weights from a checkpoint in chunks of rows, on several threads.

Beyond the weights themselves only a few chunks are in memory. Knows nothing of what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from shoal.kernels.cpu.arena import Arena
from shoal.model.parameters import Placement
from shoal.model.sources import WeightSource
from shoal.model.stow import stow

Progress = Callable[[int, int], None]

_CHUNK_BYTES = 4 * 2**20
_MAX_THREADS = 8


def fill(
    needed: list[Placement], source: WeightSource, arena: Arena | None, progress: Progress | None
) -> None:
    """Put everything in its place.

    Args:
        arena: that packed weights lie in.
        progress: called with (bytes read, bytes to read).
    """
    chunks = [chunk for placement in needed for chunk in _chunks(placement, source)]
    total, done = sum(chunk.num_bytes for chunk in chunks), 0
    # Converting is bound by memory and by calls that drop the GIL.
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MAX_THREADS), "load")
    try:
        futures = {
            pool.submit(stow, each.placement, each.start, each.stop, source, arena): each
            for each in chunks
        }
        for future in as_completed(futures):
            future.result()
            done += futures[future].num_bytes
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Rows [start, stop) of a tensor of the checkpoint, and where they go."""

    placement: Placement
    start: int
    stop: int
    num_bytes: int


def _chunks(placement: Placement, source: WeightSource) -> Iterator[_Chunk]:
    num_rows, row_bytes = placement.num_rows, source.row_bytes(placement.name)
    if placement.columns is not None:
        row_bytes = row_bytes * len(placement.columns) // placement.shape[1]
    step = num_rows if placement.places is None else max(1, _CHUNK_BYTES // max(row_bytes, 1))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield _Chunk(placement, start, stop, (stop - start) * row_bytes)
