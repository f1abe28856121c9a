"""A worker's door for KV: lends blocks to other workers, and gets blocks from them.

    lender                          borrower
    lend(lease, blocks)             pull
      read, checksum  ◄── Want ───    asks for a few pieces at a time: heads of a layer
                      ─── Piece ─►    checked, then written between two Steps
    end_lease                       report(blocks that are whole, from the first on)

What does not come, or comes wrong, ends a pull early: the blocks before it are whole, the rest is
computed. A thread of its own reads and answers; blocks are written by the worker's loop only, in
order with its Steps, so that a pull that was dropped writes nothing any more. Knows nothing of
names, requests or engines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch
from torch import Tensor

from shoal.core.errors import WireError
from shoal.core.kv import KVSource
from shoal.core.split import Range
from shoal.kernels import KVCache, LayerKV
from shoal.wire.kv_messages import KVMessage, Lacking, Part, Piece, Want
from shoal.wire.mesh import Mesh
from shoal.wire.worker_messages import DropPull, EndLease, LendBlocks, PullBlocks

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20  # as a borrower asks for them: a Step does not wait long
_MAX_PIECE_BYTES = 16 << 20
_MAX_ASKED = 8
_SILENCE_S = 2.0
_LOOK_EVERY_S = 0.25
_EARLY_S, _RETRY_S = 0.5, 0.01

Chore = Callable[[], None]
KVOrder = EndLease | PullBlocks | DropPull
"""What a worker does in order with its Steps."""


@dataclass(slots=True)
class _Pull:
    order: PullBlocks
    wanted: deque[tuple[str, Part]]
    heard_s: float
    asked: dict[Part, str] = field(default_factory=dict)
    arrived: set[Part] = field(default_factory=set)

    @property
    def num_whole(self) -> int:
        """Blocks that nothing is missing of, from the first on."""
        missing = [part.first for part in self.asked]
        missing += [part.first for _, part in self.wanted] + [part.first for part in self.arrived]
        first = self.order.first
        return min(missing, default=first + len(self.order.block_ids)) - first


class KVPort:
    """One worker's.

    Args:
        kv: its cache, of `layers` and KV heads `heads` of the model.
        mesh: of its own; it is read here only.
        heads_first: how the kernels arrange a block (`Worker.kv_heads_first`).
        post: lets the worker's loop do something between two Steps, in order with them.
        report: told of each pull's end, with its number and how many blocks are whole.
    """

    def __init__(
        self,
        kv: KVCache,
        layers: Range,
        heads: Range,
        mesh: Mesh,
        *,
        heads_first: bool = False,
        post: Callable[[Chore], None],
        report: Callable[[int, int], None],
    ) -> None:
        self._kv = kv
        self._heads_first = heads_first
        self._layers = layers
        self._heads = heads
        self._mesh = mesh
        self._post = post
        self._report = report
        self._lock = threading.Lock()  # of the leases and pulls
        self._leases: dict[int, tuple[int, ...]] = {}
        self._pulls: dict[int, _Pull] = {}
        self._known: dict[str, str] = {}
        # Asked before the order to lend was here: it comes by another way.
        self._early: list[tuple[str, Want, float]] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[KVMessage] = msgspec.msgpack.Decoder(KVMessage)

    @property
    def address(self) -> str:
        return self._mesh.address

    def start(self) -> None:
        threading.Thread(target=self._serve, name="shoal-kv", daemon=True).start()

    def lend(self, order: LendBlocks) -> None:
        """Let blocks be read from now on; from any thread."""
        with self._lock:
            self._leases[order.lease_id] = order.block_ids

    def take(self, order: KVOrder) -> None:
        """Do as the executor says; only the worker's loop calls this."""
        match order:
            case EndLease(lease_id):
                # Whoever reads holds the lock: after this nobody does.
                with self._lock:
                    self._leases.pop(lease_id, None)
            case PullBlocks():
                self._begin(order)
            case DropPull(pull_id):
                with self._lock:
                    self._pulls.pop(pull_id, None)

    # --- the borrower ---

    def _begin(self, order: PullBlocks) -> None:
        parts = self._parts(order)
        if parts is None:
            log.error("pull %d: its sources lack a layer or head kept here", order.pull_id)
            self._report(order.pull_id, 0)
            return
        if not parts:
            self._report(order.pull_id, len(order.block_ids))
            return
        pull = _Pull(order, deque(parts), time.monotonic())
        with self._lock:
            self._pulls[order.pull_id] = pull
        self._ask(pull)

    def _parts(self, order: PullBlocks) -> list[tuple[str, Part]] | None:
        """What is wanted of whom: all layers of some blocks, then those of the next ones."""
        spans: list[tuple[str, int, Range]] = []
        for layer in range(order.layers.start, order.layers.stop):
            found = _covering(self._heads, layer, order.sources)
            if found is None:
                return None
            spans += [(worker, layer, heads) for worker, heads in found]
        if not spans:
            return []
        step = max(1, _PIECE_BYTES // self._block_bytes())
        last = order.first + len(order.block_ids)
        return [
            (
                worker,
                Part(
                    layer=layer,
                    head_start=heads.start,
                    head_stop=heads.stop,
                    first=first,
                    stop=min(first + step, last),
                ),
            )
            for first in range(order.first, last, step)
            for worker, layer, heads in spans
        ]

    def _block_bytes(self) -> int:
        """Of one layer."""
        return max(
            1, sum(each[0].numel() for each in _bytes_of(self._kv.layers[0], self._heads_first))
        )

    def _ask(self, pull: _Pull) -> None:
        """For as many pieces as may be on their way."""
        while True:
            with self._lock:
                is_full = len(pull.asked) + len(pull.arrived) >= _MAX_ASKED
                if not pull.wanted or is_full or self._pulls.get(pull.order.pull_id) is not pull:
                    return
                worker, part = pull.wanted.popleft()
                pull.asked[part] = worker
            address = next(each.address for each in pull.order.sources if each.worker == worker)
            order = pull.order
            self._send(worker, address, Want(order.pull_id, order.lease_id, part, self.address))

    def _take_piece(self, sender: str, piece: Piece, payload: memoryview) -> None:
        with self._lock:
            pull = self._pulls.get(piece.pull_id)
            if pull is None or pull.asked.get(piece.part) != sender:
                return
            pull.heard_s = time.monotonic()
        if piece.part.checksum(payload) != piece.checksum or len(payload) != self._size(piece.part):
            log.error("KV of layer %d from %s is damaged: left out", piece.part.layer, sender)
            self._finish(pull)
            return
        with self._lock:
            del pull.asked[piece.part]
            pull.arrived.add(piece.part)
        numbers = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._post(partial(self._write, pull, piece.part, numbers))

    def _write(self, pull: _Pull, part: Part, payload: Tensor) -> None:
        """In the worker's loop: no Step runs, and no pull is dropped meanwhile."""
        order = pull.order
        with self._lock:
            if self._pulls.get(order.pull_id) is not pull:
                return
        first = part.first - order.first
        blocks = list(order.block_ids[first : first + part.stop - part.first])
        start, stop = part.head_start - self._heads.start, part.head_stop - self._heads.start
        offset = 0
        for kept in _bytes_of(self._kv.layers[part.layer - self._layers.start], self._heads_first):
            taken = kept[:, start:stop]
            size = taken[0].numel() * len(blocks)
            new = payload[offset : offset + size].view(len(blocks), *taken.shape[1:])
            taken[blocks] = new.to(taken.device)
            offset += size
        with self._lock:
            pull.arrived.discard(part)
            is_over = not pull.wanted and not pull.asked and not pull.arrived
        if is_over:
            self._finish(pull)
        else:
            self._ask(pull)

    def _size(self, part: Part) -> int:
        heads = slice(part.head_start - self._heads.start, part.head_stop - self._heads.start)
        layer = self._kv.layers[part.layer - self._layers.start]
        block = sum(each[0, heads].numel() for each in _bytes_of(layer, self._heads_first))
        return (part.stop - part.first) * block

    def _finish(self, pull: _Pull) -> None:
        with self._lock:
            if self._pulls.get(pull.order.pull_id) is not pull:
                return
            del self._pulls[pull.order.pull_id]
            num_whole = pull.num_whole
        self._report(pull.order.pull_id, num_whole)

    def _give_up_silent(self) -> None:
        now = time.monotonic()
        with self._lock:
            # Pieces that wait to be written are our own delay, not the lender's.
            silent = [
                pull
                for pull in self._pulls.values()
                if not pull.arrived and now - pull.heard_s > _SILENCE_S
            ]
        for pull in silent:
            log.error("pull %d: no KV came for %g s", pull.order.pull_id, _SILENCE_S)
            self._finish(pull)

    # --- the lender ---

    def _answer(self, sender: str, want: Want, until: float) -> None:
        payload = self._read(want)
        if payload is None:
            if time.monotonic() < until:
                self._early.append((sender, want, until))
            else:
                self._send(sender, want.address, Lacking(want.pull_id))
            return
        piece = Piece(want.pull_id, want.part, want.part.checksum(payload))
        self._send(sender, want.address, piece, payload)

    def _read(self, want: Want) -> bytes | None:
        part = want.part
        layer, start = part.layer - self._layers.start, part.head_start - self._heads.start
        stop = part.head_stop - self._heads.start
        with self._lock:
            blocks = self._leases.get(want.lease_id, ())
            is_here = 0 <= layer < len(self._layers) and 0 <= start < stop <= len(self._heads)
            if not is_here or not 0 <= part.first < part.stop <= len(blocks):
                return None
            if part.stop - part.first > 1 and self._size(part) > _MAX_PIECE_BYTES:
                return None
            chosen = list(blocks[part.first : part.stop])
            kept = [
                each[:, start:stop][chosen]
                for each in _bytes_of(self._kv.layers[layer], self._heads_first)
            ]
            return b"".join(each.cpu().numpy().tobytes() for each in kept)

    # --- its thread ---

    def _serve(self) -> None:
        while True:
            try:
                arrived = self._mesh.receive(_RETRY_S if self._early else _LOOK_EVERY_S)
                if arrived is not None:
                    self._take(*arrived)
            except (WireError, msgspec.DecodeError) as error:
                log.error("a message about KV is left out: %s", error)
            early, self._early = self._early, []
            for sender, want, until in early:
                self._answer(sender, want, until)
            self._give_up_silent()

    def _take(self, sender: str, header: bytes, payload: memoryview) -> None:
        match message := self._decoder.decode(header):
            case Want():
                self._answer(sender, message, time.monotonic() + _EARLY_S)
            case Piece():
                self._take_piece(sender, message, payload)
            case Lacking(pull_id):
                with self._lock:
                    pull = self._pulls.get(pull_id)
                if pull is not None and sender in pull.asked.values():
                    log.warning("pull %d: %s lends these blocks no more", pull_id, sender)
                    self._finish(pull)

    def _send(self, peer: str, address: str, message: KVMessage, payload: bytes = b"") -> None:
        try:
            with self._lock:
                is_new = self._known.get(peer) != address
                self._known[peer] = address
            if is_new:
                self._mesh.connect(peer, address)
            self._mesh.send(peer, self._encoder.encode(message), payload)
        except WireError as error:
            log.error("KV for or from %s: %s", peer, error)


def _covering(
    heads: Range, layer: int, sources: tuple[KVSource, ...]
) -> list[tuple[str, Range]] | None:
    """Who gives which of the heads; None: not all of them are to be had."""
    found, done = [], heads.start
    for source in sorted(sources, key=lambda each: each.heads.start):
        if not source.layers.start <= layer < source.layers.stop or source.heads.start > done:
            continue
        stop = min(source.heads.stop, heads.stop)
        if stop > done:
            found.append((source.worker, Range(done, stop)))
            done = stop
    return found if done >= heads.stop else None


def _bytes_of(layer: LayerKV, heads_first: bool) -> list[Tensor]:
    """Keys, values and their scales, each [blocks, heads, ...] in bytes.

    Whoever exchanges KV arranges blocks alike: the kernels are part of what names them.
    """
    kept = [layer.keys_NBHD, layer.values_NBHD]
    scales = (layer.key_scales_NBH, layer.value_scales_NBH)
    kept += [each[..., None] for each in scales if each is not None]
    if heads_first:
        return [_heads_first(each).view(torch.uint8) for each in kept]
    return [each.view(torch.uint8).transpose(1, 2) for each in kept]


def _heads_first(tensor: Tensor) -> Tensor:
    """The same memory, as kernels see it that keep all 16 tokens of a head side by side."""
    num_blocks, num_slots, num_heads, size = tensor.shape
    return tensor.view(num_blocks, num_heads, num_slots * size)
