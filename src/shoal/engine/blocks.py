"""Logical KV blocks: who holds which, and which hold KV worth finding again.

A block is 16 tokens of KV. A full one is named by its content, so that any later request
with the same beginning finds it:

    name(i) = hash(name(i-1), tokens of block i)      name(-1) = hash(model, adapter, salt)
    key(i) = name(i), layers                          what a pool finds it by

A block no sequence holds stays findable until its room is needed: least recently used
first, the tail of a sequence before its head. Knows nothing of devices, sequences or routes.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.core.step import BLOCK_SIZE
from shoal.engine.free_list import FreeList

BlockName = bytes
_NAMED_BYTES = 8 * BLOCK_SIZE
"""That a block's tokens are named by."""


def root_name(model_digest: str, salt: str, adapter: str = "") -> BlockName:
    """The parent of every first block: what must be equal for KV to be shared at all."""
    parts = [part.encode() for part in (model_digest, adapter, salt)]
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.blake2b(framed, digest_size=16).digest()


def block_name(parent: BlockName, token_ids: Sequence[int]) -> BlockName:
    """The name of a full block (`token_ids` has 16 entries) that follows `parent`."""
    (name,) = block_names(parent, token_ids)
    return name


def block_names(parent: BlockName, token_ids: Sequence[int]) -> list[BlockName]:
    """Names of full blocks, one after another, that follow `parent`."""
    content, blake2b, names = array("q", token_ids).tobytes(), hashlib.blake2b, []
    for start in range(0, len(content), _NAMED_BYTES):
        block = content[start : start + _NAMED_BYTES]
        parent = blake2b(parent + block, digest_size=16).digest()
        names.append(parent)
    return names


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Reference-counted blocks with a content index.

    A block is *held* (count > 0) or *free*; a free one may still have a name and be found.

    Args:
        parts: sizes of consecutive parts that are on different devices; those of a sequence are
            then taken from all parts in proportion, so that its attention keeps all devices busy.
    """

    def __init__(self, num_blocks: int, parts: Sequence[int] = ()) -> None:
        assert not parts or sum(parts) == num_blocks, f"{parts} are not {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._holders = array("i", bytes(4 * num_blocks))
        self._names: list[BlockName | None] = [None] * num_blocks
        self._index: dict[BlockName, int] = {}
        # Oldest first: the next to be reused.
        self._free = FreeList(num_blocks, _interleaved(parts) if len(parts) > 1 else ())

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block: int) -> bool:
        return self._holders[block] == 0

    def find(self, names: Iterable[BlockName]) -> list[int]:
        """The blocks holding the longest known beginning of `names`; nobody holds them yet."""
        found: list[int] = []
        for name in names:
            block = self._index.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Become one more holder of blocks that `find` gave."""
        for block in blocks:
            if self._holders[block] == 0:
                self._free.remove(block)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; what they held is forgotten. The caller checks `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = self._free.take(count)
        for block in taken:
            self._holders[block] = 1
            if self._names[block] is not None:
                self._forget(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding a sequence's blocks, given in order."""
        # Backwards, so that a tail is reused before the head others may share.
        holders, names, findable = self._holders, self._names, []
        for block in reversed(blocks):
            left = holders[block] - 1
            assert left >= 0, f"block {block} released too often"
            holders[block] = left
            if left == 0:
                if names[block] is None:
                    self._free.add_first(block)
                else:
                    findable.append(block)
        self._free.add_last(findable)

    def publish(self, named: Iterable[tuple[int, BlockName]]) -> None:
        """Make held, full blocks findable, each unless another already has its name."""
        index, names = self._index, self._names
        for block, name in named:
            if name not in index:
                index[name] = block
                names[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """The content of these blocks can't be trusted: nobody shall find them."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """No block's content can be trusted any more (its workers are gone)."""
        self._index.clear()
        self._names = [None] * self.num_blocks

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compare with what the sequences say they hold; for tests and idle time."""
        counts = Counter(block for blocks in held for block in blocks)
        assert all(count == counts[block] for block, count in enumerate(self._holders)), (
            "holders differ from what the sequences hold"
        )
        free = list(self._free)
        assert len(free) == len(self._free), "the free list does not say how long it is"
        assert set(free) == {b for b, count in enumerate(self._holders) if count == 0}
        assert all(self._names[block] == name for name, block in self._index.items())
        assert sum(name is not None for name in self._names) == len(self._index)

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            del self._index[name]
            self._names[block] = None


def _interleaved(parts: Sequence[int]) -> list[int]:
    """All blocks of consecutive parts, such that every beginning has some of each in proportion."""
    starts = itertools.accumulate(parts, initial=0)
    placed = [
        ((index + 0.5) / size, start + index)
        for start, size in zip(starts, parts, strict=False)
        for index in range(size)
    ]
    return [block for _, block in sorted(placed)]
