"""A worker's loop: Steps come, wait for their input, run in order, and their output goes on.

    Step ────────────┐                      ┌─► activations, to ranks of the next instance
    activations ─────┼─► inbox ─► Worker ───┼─► tokens, to the ranks of the first one
    tokens ──────────┘                      └─► StepResult, to the engine

One thread runs it; all else is posted to it. Knows nothing of processes, sockets or requests.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, runtime_checkable

from torch import Tensor

from shoal.comm import Group
from shoal.core.errors import CommError, WireError
from shoal.core.step import Step
from shoal.core.step_times import StepClock
from shoal.wire.peer_messages import Activations, Go, PeerMessage, Tokens
from shoal.wire.worker_messages import (
    Done,
    Failed,
    Release,
    Reset,
    ResetDone,
)
from shoal.worker.dealing import ComputeClock, Dealings
from shoal.worker.launched import LaunchedStep
from shoal.worker.order import StepOrder
from shoal.worker.place import Place
from shoal.worker.runner import Worker

log = logging.getLogger(__name__)

# How often an asynchronous device is looked at while nothing new is there to launch.
_POLL_S = 0.0005
# Messages of an incarnation that has not begun here yet: a few Steps' worth.
_MAX_EARLY = 256

Report = Callable[[Done | Failed | ResetDone], None]


class Transport(Protocol):
    """How messages get to other workers (a mesh of sockets, or queues of this process)."""

    def send(self, peer: str, message: PeerMessage, hidden_TE: Tensor | None = None) -> None:
        """Does not block; the tensor does not change any more. May fail later, by `Unsent`."""


@dataclass(frozen=True, slots=True, eq=False)
class FromPeer:
    """A message of another worker; `hidden_TE` comes with `Activations`."""

    message: PeerMessage
    hidden_TE: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unsent:
    """A message that the transport took, and could not send."""

    message: Activations
    peer: str
    error: Exception


@dataclass(frozen=True, slots=True, eq=False)
class Chore:
    """Something to do between two Steps."""

    do: Callable[[], None]


Item = Step | FromPeer | Unsent | Release | Reset | Chore | None


class Stretch(Protocol):
    """What makes a lab's device as slow as it shall be."""

    def begin(self) -> None: ...

    def pay(self) -> None: ...


@runtime_checkable
class _Queueing(Protocol):
    """A group whose collectives are only queued when they return."""

    def finish(self) -> None:
        """Wait for them; raises `CommError` as they do."""


class StageRunner:
    """Runs the Steps of one worker.

    Args:
        report: told of results (by the rank that has them to give), failures and resets.
        group: the ranks of the instance; None: there is one.
        stretch: of a lab's device without a group; None: it runs as fast as it can.
        dealings: where its experts may be dealt anew.

    Attributes:
        clock: of the Steps it has computed.
        steps: what they took, one by one.
    """

    def __init__(
        self,
        worker: Worker,
        place: Place,
        transport: Transport,
        report: Report,
        *,
        group: Group | None = None,
        stretch: Stretch | None = None,
        dealings: Dealings | None = None,
        incarnation: int = 0,
    ) -> None:
        self.clock = ComputeClock(group)
        self.steps = StepClock()
        self._worker = worker
        self._place = place
        self._transport = transport
        self._report = report
        self._group = group
        collectives: object = group
        self._queue = collectives if isinstance(collectives, _Queueing) else None
        self._stretch = stretch
        self._dealings = dealings
        self._incarnation = incarnation
        self._wanted = incarnation
        self._has_failed = False
        self._inbox: SimpleQueue[Item] = SimpleQueue()
        self._order = StepOrder(follows=place.follows)
        self._activations: dict[int, Tensor] = {}
        self._early: deque[FromPeer] = deque(maxlen=_MAX_EARLY)
        self._launched: deque[tuple[Step, LaunchedStep, float]] = deque()
        self._ready_s = 0.0  # when what came last, after nothing was left to do, was there
        self._num_steps = 0
        self._busy_since_s: float | None = None

    # --- from any thread ---

    def post(self, item: Step | FromPeer | Unsent | Release | Chore) -> None:
        self._inbox.put(item)

    def reset(self, incarnation: int) -> None:
        """Abandon what runs, then go on with Steps of `incarnation`."""
        self._wanted = incarnation
        if self._group is not None:
            self._group.abort()
        self._inbox.put(Reset(incarnation))

    def stop(self) -> None:
        """Let `run` return."""
        if self._group is not None:
            self._group.abort()
        self._inbox.put(None)

    def progress(self) -> tuple[int, int, float]:
        """Incarnation, Steps finished in all, and seconds spent with the one that runs."""
        since_s = self._busy_since_s
        busy_s = 0.0 if since_s is None else time.monotonic() - since_s
        return self._incarnation, self._num_steps, busy_s

    # --- the loop ---

    def run(self) -> None:
        while self._take_in():
            while not self._is_stale and (step := self._order.take(self._is_ready)) is not None:
                self._run_step(step)
                if not self._inbox.empty() and not self._take_in():
                    return
            self._collect_done()

    @property
    def _is_stale(self) -> bool:
        return self._has_failed or self._wanted != self._incarnation

    def _take_in(self) -> bool:
        """All that was posted; at least one, unless a device is to be looked at. False: stop."""
        try:
            has_waited = self._inbox.empty()
            item = self._inbox.get(timeout=_POLL_S if self._launched else None)
            if has_waited:
                self._ready_s = time.monotonic()
            while item is not None:
                self._take(item)
                item = self._inbox.get_nowait()
        except Empty:
            return True
        return False

    def _take(self, item: Step | FromPeer | Unsent | Release | Reset | Chore) -> None:
        match item:
            case Step():
                if item.incarnation == self._incarnation and not self._has_failed:
                    self._order.add(item)
            case FromPeer():
                self._take_message(item)
            case Unsent(message, peer, error):
                if message.incarnation == self._incarnation and not self._has_failed:
                    self._fail(message, _unsent(peer, error))
            case Release(sequence_ids):
                self._worker.release(sequence_ids)
            case Reset(incarnation):
                self._begin(incarnation)
            case Chore(do):
                _do(do)

    def _take_message(self, item: FromPeer) -> None:
        message = item.message
        if message.incarnation > self._incarnation:
            self._early.append(item)
        if message.incarnation != self._incarnation or self._has_failed:
            return
        match message:
            case Activations(_, step_id):
                assert item.hidden_TE is not None
                self._activations[step_id] = item.hidden_TE
            case Tokens(_, step_id, token_ids):
                self._worker.note_tokens(step_id, token_ids)
            case Go(_, step_id):
                self._order.note_decision(step_id)

    def _begin(self, incarnation: int) -> None:
        if incarnation != self._wanted:
            return  # a later Reset is on its way
        self._forget()
        self._incarnation, self._has_failed = incarnation, False
        if self._group is not None:
            self._group.reset(incarnation)
        early, self._early = self._early, deque(maxlen=_MAX_EARLY)
        for item in early:
            self._take_message(item)
        self._report(ResetDone(incarnation))

    def _forget(self) -> None:
        self._order.clear()
        self._activations.clear()
        self._launched.clear()
        self._worker.reset()

    # --- one Step ---

    def _is_ready(self, step: Step) -> bool:
        hop = self._place.hops[step.route]
        if not self._place.shard.has_stream:
            return True  # what it needs comes from the ranks of its instance
        if hop:
            return step.step_id in self._activations
        # Alone on its route it sampled them itself, in Steps before this one.
        return len(self._place.routes[step.route]) == 1 or self._worker.knows_tokens_of(step)

    def _run_step(self, step: Step) -> None:
        self._busy_since_s = time.monotonic()
        try:
            if self._place.leads:
                for mate in self._place.mates:
                    self._send(mate, Go(step.incarnation, step.step_id))
            self._launch(step)
        except Exception as error:  # noqa: BLE001 - whatever a device throws ends the incarnation
            self._fail(step, error)
        finally:
            self._busy_since_s = None

    def _launch(self, step: Step) -> None:
        hop = self._place.hops[step.route]
        if self._dealings is not None:
            self._dealings.switch(step.dealing)
        self.clock.begin()
        if self._stretch is not None:
            self._stretch.begin()
        launched = self._worker.launch(step, hop, self._activations.pop(step.step_id, None))
        if self._stretch is not None:
            self._stretch.pay()
        self.clock.end()
        if launched.hidden_TE is None:
            self._launched.append((step, launched, self._ready_s))
            self._collect_done()
            return
        if self._queue is not None:
            self._queue.finish()
        hidden_TE = launched.hidden_TE
        dtype = str(hidden_TE.dtype).removeprefix("torch.")
        message = Activations(step.incarnation, step.step_id, len(hidden_TE), dtype)
        for peer in self._place.takers(step.route):
            self._send(peer, message, hidden_TE)
        self._note(step, self._ready_s)
        self._num_steps += 1

    def _collect_done(self) -> None:
        while self._launched and self._launched[0][1].done:
            step, launched, began_s = self._launched.popleft()
            try:
                self._collect(step, launched)
                self._note(step, began_s)
            except Exception as error:  # noqa: BLE001 - as in _run_step
                self._fail(step, error)

    def _collect(self, step: Step, launched: LaunchedStep) -> None:
        if step.num_hops is None and (takers := self._place.token_takers(step.route)):
            message = Tokens(step.incarnation, step.step_id, launched.token_ids())
            for peer in takers:
                self._send(peer, message)
        self._num_steps += 1
        if self._place.rank == 0:
            self._report(Done(launched.wait()))

    def _note(self, step: Step, began_s: float) -> None:
        hop = self._place.routes[step.route][self._place.hops[step.route]]
        self.steps.note(step, hop.layers, began_s, time.monotonic())

    def _send(self, peer: str, message: PeerMessage, hidden_TE: Tensor | None = None) -> None:
        try:
            self._transport.send(peer, message, hidden_TE)
        except WireError as error:
            raise _unsent(peer, error) from error

    def _fail(self, step: Step | Activations, error: Exception) -> None:
        self._forget()
        self._has_failed = True
        if step.incarnation != self._wanted:
            return  # it was told to abandon the Step
        is_cut_off = isinstance(error, CommError)
        log.error("step %d failed: %s", step.step_id, error, exc_info=None if is_cut_off else error)
        self._report(
            Failed(
                step_id=step.step_id,
                incarnation=step.incarnation,
                reason=f"{type(error).__name__}: {error}",
                blames_step=not is_cut_off,
            )
        )
        if self._group is not None:
            self._group.abort()  # the other ranks need not wait for this one


def _do(chore: Callable[[], None]) -> None:
    try:
        chore()
    except Exception:
        # Whoever waits for it has a time limit; Steps must go on.
        log.exception("what was to be done between two Steps failed")


def _unsent(peer: str, error: Exception) -> Exception:
    """A device's error stays its own: it, and not the peer, is to blame."""
    if isinstance(error, WireError):
        return CommError(f"{peer} takes no messages: {error}")
    return error
