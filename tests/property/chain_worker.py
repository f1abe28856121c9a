"""A worker without a model: its KV holds hash chains, so that wrong KV gives wrong tokens.

Slot p of a sequence holds hash(slot p-1, token p). A row reads the slot before its first
token out of the *blocks it names*; the sampled token is a function of the last hash. What a
request produces is thus a pure function of its prompt: any mix-up of blocks, positions or
token references shows as a different token.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from shoal.core.step import BLOCK_SIZE, RowResult, Step, StepResult, StepRow

EOS = 0


def link(parent: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(8, "little"), parent)


def next_token(chain: int, vocab_size: int, seed: int | None) -> int:
    """Token 0 (EOS) about once in `vocab_size` draws; seeds differ in one draw of eight, so
    that sequences which begin alike part in the middle of blocks."""
    if seed is not None and chain % 8 == 0:
        chain = link(chain, seed)
    return chain % vocab_size


def expected_output(
    prompt: Sequence[int], max_tokens: int, vocab_size: int, seed: int | None = None
) -> list[int]:
    """What the whole engine must produce for a prompt."""
    chain = 0
    for token_id in prompt:
        chain = link(chain, token_id)
    output: list[int] = []
    while len(output) < max_tokens and (not output or output[-1] != EOS):
        output.append(next_token(chain, vocab_size, seed))
        chain = link(chain, output[-1])
    return output


class ChainWorker:
    """Runs Steps in order; `run` is called when the test decides the result is back."""

    def __init__(self, num_blocks: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, int] = {}
        self._num_slots = num_blocks * BLOCK_SIZE
        self._sampled: dict[tuple[int, int], int] = {}
        self._known: dict[int, int | None] = {}

    @property
    def num_known_sequences(self) -> int:
        return len(self._known)

    def reset(self) -> None:
        self._slots.clear()
        self._sampled.clear()
        self._known.clear()

    def run(self, step: Step) -> StepResult:
        for sequence_id in step.released:
            self._known.pop(sequence_id, None)
        assert len({row.sequence_id for row in step.rows}) == len(step.rows)
        rows = tuple(self._run_row(step, i, row) for i, row in enumerate(step.rows))
        return StepResult(step_id=step.step_id, incarnation=step.incarnation, rows=rows)

    def _run_row(self, step: Step, index: int, row: StepRow) -> RowResult:
        if row.start_state is not None:
            self._known[row.sequence_id] = row.start_state.sampling.seed
        assert row.sequence_id in self._known, "a row of a sequence the worker does not know"
        tokens = list(row.token_ids)
        if row.token_ref is not None:
            tokens.append(self._sampled[row.token_ref.step_id, row.token_ref.row])
        assert tokens, "an empty row"
        chain = 0 if row.start == 0 else self._slots[self._slot(row, row.start - 1)]
        for offset, token_id in enumerate(tokens):
            chain = link(chain, token_id)
            self._slots[self._slot(row, row.start + offset)] = chain
        if not row.samples:
            return RowResult()
        token_id = next_token(chain, self._vocab_size, self._known[row.sequence_id])
        if row.mask is not None:
            bits = int.from_bytes(row.mask, "little")
            allowed = [token for token in range(self._vocab_size) if bits >> token & 1]
            token_id = allowed[chain % len(allowed)]
        self._sampled[step.step_id, index] = token_id
        return RowResult(token_id=token_id)

    def _slot(self, row: StepRow, position: int) -> int:
        slot = row.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        assert 0 <= slot < self._num_slots
        return slot
