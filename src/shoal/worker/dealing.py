"""Experts of a worker, dealt anew while it runs; and what its work is, to deal them by.

    control    Deal ─► loaded on a thread of its own ─► Dealt
    Steps      the first one of that dealing or a later one: swapped, just before it runs

All ranks of an instance run Steps in one order, so they swap at the same one, and what was dealt
but is named by no Step changes nothing. Knows nothing of who decides, or of files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.split import Dealing, ExpertShare
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.parameters import ExpertParameters
from shoal.wire.worker_messages import Deal, Dealt, ExpertLoad

_BYTES = {"int8": 34 / 32, "int4": 18 / 32, "int4_min": 20 / 32, "fp8": 1.0}

log = logging.getLogger(__name__)

LoadExperts = Callable[[int, tuple[ExpertShare, ...]], ExpertParameters]
"""Of a layer of the model."""


Swap = Callable[[int, ExpertParameters, Dealing], None]
"""From now on a layer of the model has these, and its instance that dealing."""


_Loaded = dict[int, tuple[ExpertParameters, Dealing]]


class Dealings:
    """What was dealt to a worker and is not in use yet.

    Args:
        rank: of its instance.
        report: told when it is loaded, from the thread that loads.
    """

    def __init__(
        self, rank: int, load: LoadExperts, swap: Swap, report: Callable[[Dealt], None]
    ) -> None:
        self._rank = rank
        self._load = load
        self._swap = swap
        self._report = report
        self._lock = threading.Lock()
        self._valid: set[int] = set()
        self._loaded: dict[int, _Loaded] = {}
        self._wanted: SimpleQueue[Deal] = SimpleQueue()
        threading.Thread(target=self._load_all, name="shoal-experts", daemon=True).start()

    def take(self, message: Deal) -> None:
        """Load it; from any thread."""
        with self._lock:
            self._valid = {each for each in self._valid if each <= message.after}
            self._valid.add(message.version)
            self._loaded = {each: self._loaded[each] for each in self._loaded.keys() & self._valid}
        self._wanted.put(message)

    def switch(self, version: int) -> None:
        """Take up what was dealt up to this version; between Steps."""
        if not self._loaded:
            return
        with self._lock:
            due = sorted(each for each in self._loaded if each <= version)
            layers = [self._loaded.pop(each) for each in due]
        for experts_of in layers:
            for layer, (experts, dealing) in experts_of.items():
                self._swap(layer, experts, dealing)

    def _load_all(self) -> None:
        while True:
            message = self._wanted.get()
            try:
                found = {
                    layer: (self._load(layer, dealing[self._rank]), dealing)
                    for layer, dealing in message.dealings.items()
                }
            except Exception as error:  # whatever it is, the worker can go on as it is
                log.exception("experts of dealing %d were not loaded", message.version)
                self._report(Dealt(message.version, f"{type(error).__name__}: {error}"))
                continue
            with self._lock:
                if message.version in self._valid:
                    self._loaded[message.version] = found
            self._report(Dealt(message.version))


def expert_bytes(decoder: Decoder | PackedDecoder) -> int:
    """Of an expert as the decoder keeps them, without paddings; 0: it cannot load others."""
    loader, rules = decoder.expert_loader, decoder.spec.experts
    if loader is None or rules is None or decoder.stream is not None:
        return 0
    if isinstance(decoder, PackedDecoder) and decoder.store is not None:
        return 0
    layers = range(decoder.shard.layers.start, decoder.shard.layers.stop)
    mixed = [each for each in layers if decoder.spec.layers[each].has_experts]
    if not mixed:
        return 0
    formats, size = loader.formats.layers[mixed[0]], rules.ffn_size * decoder.spec.hidden_size
    up, down = (
        decoder.dtype.itemsize if each is None else _BYTES[each]
        for each in (formats.expert_gate_up, formats.expert_down)
    )
    return round(size * (2 * up + down))


@runtime_checkable
class _Timed(Protocol):
    """A group that knows how long its collectives took."""

    @property
    def waited_s(self) -> float: ...


class ComputeClock:
    """Time a worker's own computing takes, without what it waits for other ranks.

    Attributes:
        num_steps: that ended.
        total_s: spent on them; None: the group cannot tell.
    """

    def __init__(self, group: Group | None) -> None:
        collectives: object = group
        self._group = collectives if isinstance(collectives, _Timed) else None
        self.num_steps = 0
        self.total_s: float | None = None if self._group is None else 0.0
        self._began_s = self._waited_s = 0.0

    def begin(self) -> None:
        if self._group is not None:
            self._began_s, self._waited_s = time.monotonic(), self._group.waited_s

    def end(self) -> None:
        self.num_steps += 1
        if self._group is not None and self.total_s is not None:
            waited_s = self._group.waited_s - self._waited_s
            self.total_s += time.monotonic() - self._began_s - waited_s


class Meter:
    """What a worker did from one look to the next.

    Args:
        counts: int64 [layers, X], tokens of each expert so far; None: another rank says it.
    """

    def __init__(self, clock: ComputeClock, counts: Tensor | None) -> None:
        self._clock = clock
        self._counts = counts
        self._num_steps, self._computed_s = clock.num_steps, clock.total_s
        self._before = torch.zeros(0) if counts is None else counts.clone()

    def look(self) -> ExpertLoad | None:
        """None: no Step has run."""
        num_steps, computed_s = self._clock.num_steps, self._clock.total_s
        if num_steps == self._num_steps:
            return None
        tokens: list[list[int]] = []
        if self._counts is not None:
            now = self._counts.clone()
            tokens, self._before = (now - self._before).tolist(), now
        load = ExpertLoad(
            num_steps=num_steps - self._num_steps,
            computed_s=None if computed_s is None else computed_s - (self._computed_s or 0.0),
            tokens=tokens,
        )
        self._num_steps, self._computed_s = num_steps, computed_s
        return load
