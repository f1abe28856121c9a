"""Experts that stay on disk, and memory for those that are wanted often.

    file     expert 0 | expert 1 | ...    of each layer, in a few pieces, each with a checksum
    slots    [ 4 ][ 1 ][ 7 ] ...          of each layer; who gets one: expert_slots.py

When a step has chosen its experts, those that are missing are read, a few pieces at a time, and
every piece is checked. Knows nothing of what the bytes mean, or of how experts run.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.errors import DeviceError
from shoal.model.expert_slots import ExpertSlots
from shoal.model.layer_file import LayerFile

_READERS = 4
_PIECE_BYTES = 256 << 10
_PAGE = 4096
_MAX_PROBES = 64
_MAX_PROBE_BYTES = 1 << 30
_FIRST_REPORT = 64  # steps; each of the next comes after twice as many
_log = logging.getLogger(__name__)

Place = tuple[int, int, int]
"""An expert, and the addresses of its gate and up, and of its down."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredExperts:
    """Of one layer.

    Attributes:
        layer: of the model.
        num_experts: on this rank; they are known by their place among those.
        gate_up_bytes: of each expert, which begins with them.
        slots: memory, uint8 [slots, bytes of an expert].
        expected_wanted, expected_missing: by a token, and of those what memory has not.
    """

    layer: int
    num_experts: int
    gate_up_bytes: int
    slots: Tensor
    expected_wanted: float
    expected_missing: float


def pieces(num_bytes: int) -> list[int]:
    """Bytes of each piece of an expert: so many that all readers are busy with a single one."""
    count = min(_READERS, max(1, num_bytes // _PIECE_BYTES))
    size = -(-num_bytes // count // _PAGE) * _PAGE
    return [min(size, num_bytes - start) for start in range(0, num_bytes, size)]


class ExpertStore:
    """Brings experts into their layers' slots.

    Args:
        file: the pieces of all experts, layer by layer.
        resident: weights that stay in memory.
        instead_bytes: as `DiskRoom` says.

    Attributes:
        in_memory: all weights that are in memory at one time.
        num_uses, num_reads: experts that steps wanted, and those of them that were read.
        read_s: seconds that reading an expert took before the first step.

    Raises:
        DeviceError: what is on disk is damaged, or the disk fails.
    """

    def __init__(
        self,
        file: LayerFile,
        layers: Sequence[StoredExperts],
        resident: Tensor,
        instead_bytes: int | None = None,
    ) -> None:
        self.in_memory = (resident, *(each.slots.flatten() for each in layers))
        self.layers = tuple(layers)
        self.instead_bytes = instead_bytes
        self._pool = ThreadPoolExecutor(_READERS, "shoal-experts")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._layers: dict[int, _Layer] = {}
        first = 0
        for each in layers:
            self._layers[each.layer] = _Layer(each, file, first, self._pool)
            first += each.num_experts * len(pieces(each.slots.shape[1]))
        self._num_steps, self._next_report = 0, _FIRST_REPORT
        self._waited_s = 0.0
        self._reported = (0, 0, 0, 0.0)
        self._check_all()
        self.read_s = self._measured()

    @property
    def size_bytes(self) -> int:
        """Of all its experts, on disk."""
        return sum(each.num_experts * each.slots.shape[1] for each in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Memory that it takes."""
        return sum(each.slots.nbytes for each in self.layers)

    @property
    def num_uses(self) -> int:
        return sum(each.experts.num_uses for each in self._layers.values())

    @property
    def num_reads(self) -> int:
        return sum(each.experts.num_reads for each in self._layers.values())

    def bring(self, layer: int, first: int, tokens: Sequence[int]) -> tuple[int, list[Place]]:
        """Wait until the next experts of a step are in memory; they stay until the next call.

        Args:
            first: the first that has not run yet; 0: the step begins with this layer.
            tokens: of each expert, in this step.

        Returns:
            Below which number they can run now, and where those lie that have tokens.

        Raises:
            DeviceError: they can't be read, or what was read is damaged.
        """
        own = self._layers[layer]
        if first == 0:
            own.begin([expert for expert, count in enumerate(tokens) if count])
            if layer == self.layers[0].layer:
                self._note_step()
        began_s = time.perf_counter()
        until, places = own.bring(first)
        self._waited_s += time.perf_counter() - began_s
        return until, places

    def _note_step(self) -> None:
        if self._num_steps == self._next_report:
            self._report()
        self._num_steps += 1

    def _report(self) -> None:
        now = self._num_steps, self.num_uses, self.num_reads, self._waited_s
        steps, uses, reads, waited_s = (a - b for a, b in zip(now, self._reported, strict=True))
        self._reported, self._next_report = now, 2 * self._next_report
        if uses:
            _log.info(
                "experts on disk: in %d steps %.0f %% of those wanted were in memory, and a step "
                "waited %.1f ms for the others",
                steps,
                100 * (1 - reads / uses),
                1e3 * waited_s / steps,
            )

    def _check_all(self) -> None:
        """Every expert once: each piece is compared with its checksum when it is read."""
        for each in self.layers:
            own = self._layers[each.layer]
            for start in range(0, each.num_experts, len(each.slots)):
                stop = min(start + len(each.slots), each.num_experts)
                own.read(list(enumerate(range(start, stop))))

    def _measured(self) -> float:
        """Seconds to read an expert, as many at once as a step of one token is expected to read."""
        layers = [each for each in self.layers if each.expected_missing]
        if not layers:
            return 0.0
        total_s, count, num_bytes = 0.0, 0, 0
        for probe in range(_MAX_PROBES):
            if num_bytes > _MAX_PROBE_BYTES:
                break
            each = layers[probe * len(layers) // _MAX_PROBES]
            at_once = min(max(1, round(each.expected_missing)), len(each.slots))
            apart = each.num_experts // at_once
            experts = [(17 * probe + apart * n) % each.num_experts for n in range(at_once)]
            began_s = time.perf_counter()
            self._layers[each.layer].read(list(enumerate(experts)))
            total_s += time.perf_counter() - began_s
            count += at_once
            num_bytes += at_once * each.slots.shape[1]
        return total_s / count


class _Layer:
    """Experts of one layer: which are in memory, and which are on their way."""

    def __init__(
        self, stored: StoredExperts, file: LayerFile, first: int, pool: ThreadPoolExecutor
    ) -> None:
        self.experts = ExpertSlots(stored.num_experts, len(stored.slots))
        self._stored, self._file, self._first, self._pool = stored, file, first, pool
        self._pieces = pieces(stored.slots.shape[1])
        self._coming: dict[int, list[Future[None]]] = {}

    def begin(self, wanted: Sequence[int]) -> None:
        """A step wants these; what an earlier one left on its way has arrived first."""
        for expert in list(self._coming):
            try:
                self._arrive(expert)
            except DeviceError as error:
                _log.warning("an expert that is no longer wanted was not read: %s", error)
        self.experts.begin(wanted)

    def bring(self, first: int) -> tuple[int, list[Place]]:
        turn = self.experts.next_round(first)
        for expert, slot in turn.reads:
            self._coming[expert] = self._submit(expert, slot)
        for expert in turn.experts:
            self._arrive(expert)
        return turn.until, [self._place(expert) for expert in turn.experts]

    def read(self, experts: Sequence[tuple[int, int]]) -> None:
        """Read (slot, expert) pairs at once, before any step."""
        for each in [self._submit(expert, slot) for slot, expert in experts]:
            _finish(each)

    def _submit(self, expert: int, slot: int) -> list[Future[None]]:
        item = self._first + expert * len(self._pieces)
        parts = torch.split(self._stored.slots[slot], self._pieces)
        return [
            self._pool.submit(_read, self._file, item + n, part, self._stored.layer)
            for n, part in enumerate(parts)
        ]

    def _arrive(self, expert: int) -> None:
        try:
            _finish(self._coming.pop(expert, []))
        except DeviceError:
            self.experts.forget(expert)
            raise

    def _place(self, expert: int) -> Place:
        slot = self._stored.slots[self.experts.slot_of[expert]].data_ptr()
        return expert, slot, slot + self._stored.gate_up_bytes


def _read(file: LayerFile, item: int, target: Tensor, layer: int) -> None:
    file.read(item, target)
    if not file.is_whole(item, target):
        raise DeviceError(
            f"weights of experts of layer {layer} are damaged on disk; remove the folder of packed "
            "weights, and start again"
        )


def _finish(reads: Sequence[Future[None]]) -> None:
    """Wait for all of them, so that none still writes; then say what went wrong."""
    errors = [each.exception() for each in reads]
    for error in errors:
        if error is not None:
            raise error
