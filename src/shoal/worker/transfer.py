"""A worker's door for KV: lends blocks to other workers, and gets blocks from them.

    lender                          borrower
    lend(lease, blocks)             pull
      read, checksum  ◄── Want ───    asks for a few pieces at a time: heads of a layer
                      ─── Piece ─►    checked, then written between two Steps
    end_lease                       report(blocks that are whole, from the first on)

Pieces may be asked for before they are computed; they are then sent as soon as they are
(worker/lender.py). Where a piece does not come, or comes wrong, a pull ends: the blocks before it
are whole, the rest is computed. A thread of its own reads and answers; blocks are written by the
worker's loop only, in order with its Steps, so that a pull that was dropped writes nothing any
more. Knows nothing of names, requests or engines.
"""

from __future__ import annotations

import contextlib
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
from shoal.kernels import KVCache
from shoal.wire.kv_messages import KVMessage, Lacking, Later, Look, Part, Piece, Want
from shoal.wire.mesh import Mesh
from shoal.wire.worker_messages import DropPull, EndLease, LendBlocks, PullBlocks, StopPull
from shoal.worker.kv_bytes import KVBytes
from shoal.worker.lender import Lender

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20  # as a borrower asks for them: a Step does not wait long
_PIECE_BLOCKS = 16  # fewer than a chunk of a prompt: what is computed need not wait for more
_ASKED_BYTES = 8 << 20
_MIN_ASKED, _MAX_ASKED = 8, 64
_SILENCE_S = 2.0
_LOOK_EVERY_S = 0.25

Chore = Callable[[], None]
KVOrder = EndLease | PullBlocks | StopPull | DropPull
"""What a worker does in order with its Steps."""


@dataclass(slots=True)
class _Pull:
    """
    Attributes:
        stop: blocks from here on will not come.
        max_asked: pieces that may be on their way, or wait to be written.
    """

    order: PullBlocks
    stop: int
    wanted: deque[tuple[str, Part]]
    max_asked: int
    heard_s: float
    asked: dict[Part, str] = field(default_factory=dict)
    arrived: set[Part] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return not self.wanted and not self.asked and not self.arrived

    @property
    def num_whole(self) -> int:
        """Blocks that nothing is missing of, from the first on."""
        missing = [part.first for part in self.asked]
        missing += [part.first for _, part in self.wanted] + [part.first for part in self.arrived]
        return min([*missing, self.stop]) - self.order.first


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
        self._kv = KVBytes(kv, layers, heads, heads_first=heads_first)
        self._mesh = mesh
        self._post = post
        self._report = report
        self._lender = Lender(self._kv, self._send)
        self._lock = threading.Lock()  # of the pulls
        self._pulls: dict[int, _Pull] = {}
        self._known: dict[str, str] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[KVMessage] = msgspec.msgpack.Decoder(KVMessage)
        self._is_open = True
        self._thread = threading.Thread(target=self._serve, name="shoal-kv", daemon=True)

    @property
    def address(self) -> str:
        return self._mesh.address

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End what `start` began, and the mesh; what is under way is not told of."""
        self._is_open = False
        with contextlib.suppress(WireError):  # then it wakes by itself, a little later
            self._mesh.send(self._mesh.name, self._encoder.encode(Look()))
        self._thread.join()
        self._mesh.close()

    def lend(self, order: LendBlocks) -> None:
        """Let blocks be read from now on; from any thread."""
        if self._lender.lend(order):
            with contextlib.suppress(WireError):  # so much is there that nobody sleeps
                self._mesh.send(self._mesh.name, self._encoder.encode(Look()))

    def take(self, order: KVOrder) -> None:
        """Do as the executor says; only the worker's loop calls this."""
        match order:
            case EndLease(lease_id):
                self._lender.end(lease_id)
            case PullBlocks():
                self._begin(order)
            case StopPull(pull_id):
                with self._lock:
                    stopped = self._pulls.get(pull_id)
                if stopped is not None:
                    self._finish(stopped)
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
        window = _ASKED_BYTES // (self._kv.block_bytes * self._piece_blocks)
        max_asked = min(max(window, _MIN_ASKED), _MAX_ASKED)
        stop = order.first + len(order.block_ids)
        pull = _Pull(order, stop, deque(parts), max_asked, time.monotonic())
        with self._lock:
            self._pulls[order.pull_id] = pull
        self._ask(pull)

    def _parts(self, order: PullBlocks) -> list[tuple[str, Part]] | None:
        """What is wanted of whom: all layers of some blocks, then those of the next ones."""
        spans: list[tuple[str, int, Range]] = []
        for layer in range(order.layers.start, order.layers.stop):
            found = _covering(self._kv.heads, layer, order.sources)
            if found is None:
                return None
            spans += [(worker, layer, heads) for worker, heads in found]
        if not spans:
            return []
        step = self._piece_blocks
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

    @property
    def _piece_blocks(self) -> int:
        return min(max(1, _PIECE_BYTES // self._kv.block_bytes), _PIECE_BLOCKS)

    def _ask(self, pull: _Pull) -> None:
        """For as many pieces as may be on their way."""
        while True:
            with self._lock:
                is_full = len(pull.asked) + len(pull.arrived) >= pull.max_asked
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
        is_whole = piece.part.checksum(payload) == piece.checksum
        if not is_whole or len(payload) != self._kv.size(piece.part):
            log.error("KV of layer %d from %s is damaged: left out", piece.part.layer, sender)
            self._leave_out(pull, piece.part.first)
            return
        with self._lock:
            del pull.asked[piece.part]
            pull.arrived.add(piece.part)
        numbers = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._post(partial(self._write, pull, piece.part, numbers))

    def _leave_out(self, pull: _Pull, first: int) -> None:
        """Blocks from `first` on will not come; those before it still may."""
        with self._lock:
            pull.stop = max(min(pull.stop, first), pull.order.first)
            pull.wanted = deque(each for each in pull.wanted if each[1].first < first)
            pull.asked = {part: sent for part, sent in pull.asked.items() if part.first < first}
            is_over = pull.is_over
        if is_over:
            self._finish(pull)

    def _write(self, pull: _Pull, part: Part, payload: Tensor) -> None:
        """In the worker's loop: no Step runs, and no pull is dropped meanwhile."""
        order = pull.order
        with self._lock:
            if self._pulls.get(order.pull_id) is not pull:
                return
        first = part.first - order.first
        self._kv.write(part, order.block_ids[first : first + part.stop - part.first], payload)
        with self._lock:
            pull.arrived.discard(part)
            is_over = pull.is_over
        if is_over:
            self._finish(pull)
        else:
            self._ask(pull)

    def _finish(self, pull: _Pull) -> None:
        with self._lock:
            if self._pulls.get(pull.order.pull_id) is not pull:
                return
            del self._pulls[pull.order.pull_id]
            num_whole = pull.num_whole
        self._report(pull.order.pull_id, num_whole)

    def _give_up_silent(self, now: float) -> None:
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

    # --- its thread ---

    def _serve(self) -> None:
        look_at = 0.0
        while self._is_open:
            try:
                arrived = self._mesh.receive(_LOOK_EVERY_S)
                if arrived is not None:
                    self._take(*arrived)
            except (WireError, msgspec.DecodeError) as error:
                log.error("a message about KV is left out: %s", error)
            if (now := time.monotonic()) >= look_at:
                look_at = now + _LOOK_EVERY_S
                self._lender.look(now)
                self._give_up_silent(now)

    def _take(self, sender: str, header: bytes, payload: memoryview) -> None:
        match message := self._decoder.decode(header):
            case Want():
                self._lender.answer(sender, message, time.monotonic())
            case Piece():
                self._take_piece(sender, message, payload)
            case Lacking(pull_id, first):
                if (pull := self._asked_of(sender, pull_id)) is not None:
                    log.warning(
                        "pull %d: %s lends no more from block %d on", pull_id, sender, first
                    )
                    self._leave_out(pull, first)
            case Later(pull_id):
                if (pull := self._asked_of(sender, pull_id)) is not None:
                    pull.heard_s = time.monotonic()
            case Look():
                self._lender.look(time.monotonic())

    def _asked_of(self, sender: str, pull_id: int) -> _Pull | None:
        """A pull, if this peer was asked for something of it."""
        with self._lock:
            pull = self._pulls.get(pull_id)
            return pull if pull is not None and sender in pull.asked.values() else None

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
