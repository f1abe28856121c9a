"""Looks after attempts and replicas while time goes by: what is late, what is silent, what then.

    sent       ─► a look when its first token is later than nearly all are,
                  or its answer, if that comes as a whole                       ─► a rival, perhaps
               ─► a look when its replica has said nothing for a while          ─► doubt, and rivals
    doubt      ─► a look when the replica may be tried again                    ─► one request
    left alone ─► a look, as the other one of two attempts was to speak first   ─► another rival

Knows neither what a rival may cost (`router/hedges.py`) nor when a replica is in doubt
(`router/health.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shoal.core.request import Output
from shoal.core.stats import HedgeStats
from shoal.policy.hedging import (
    LEAST_SILENCE_S,
    SURELY_SILENT_S,
    Lateness,
    Patience,
    stalled_after_s,
)
from shoal.router.alarms import Alarms, Kind
from shoal.router.attempts import Attempts
from shoal.router.events import Effect, Send
from shoal.router.health import Health, mean_gap_s
from shoal.router.hedges import Hedges
from shoal.router.loads import Loads
from shoal.router.moves import Moves
from shoal.router.placement import Placement
from shoal.router.records import Attempt, Entry, Replica, RouterConfig
from shoal.router.stragglers import Stragglers

_AGAIN_S = 0.25
_SOONEST_S = 0.1
_PATIENCE = 0.5


class Watch:
    """
    Args:
        replicas, entries, attempts, loads, moves, placement: the router's.
    """

    def __init__(
        self,
        config: RouterConfig,
        replicas: Mapping[str, Replica],
        entries: Mapping[str, Entry],
        attempts: Attempts,
        loads: Loads,
        moves: Moves,
        placement: Placement,
    ) -> None:
        self._config = config
        self._replicas, self._entries, self._moves = replicas, entries, moves
        self._attempts, self._placement = attempts, placement
        self._patience = Patience()
        self.health = Health(replicas, loads, self._patience.first_tokens)
        self.hedges = Hedges(
            config.hedging, replicas, attempts, loads, self._patience, placement, self.send
        )
        self.stragglers = Stragglers(replicas)
        self._alarms = Alarms(self._is_wanted)
        self._listened_to: set[str] = set()  # replicas whose silence would be noticed
        self._outrun: dict[str, float] = {}  # since when they said nothing, if they did not

    @property
    def wake_s(self) -> float | None:
        """When there is something to look at."""
        return self._alarms.next_s

    @property
    def stats(self) -> HedgeStats:
        return self.hedges.stats

    def doubted(self, now: float) -> list[str]:
        """Replicas whose silence is looked at next: what they said should be known by then."""
        late = (self._attempts.of(each)[1] for each in self._alarms.names_due(now, "late"))
        waited_at = {each.replica for each in late if each is not None and each.first_s is None}
        return [*self._alarms.names_due(now, "silent", "outrun"), *sorted(waited_at)]

    # --- what happens ---

    def send(self, entry: Entry, attempt: Attempt, now: float) -> Send:
        """To the replica that it is bound to; from now on it is waited for."""
        if self._config.hedging:
            due_s = self._lateness(entry).due_s(attempt.predicted_s)
            self._alarms.set(now + due_s, "late", attempt.sent_id)
        if attempt.replica not in self._listened_to:
            self._listen_to(attempt.replica, now + LEAST_SILENCE_S)
        return self._attempts.send(entry, attempt, now)

    def said(self, entry: Entry, attempt: Attempt, output: Output, now: float) -> None:
        """By an attempt that leads; its tokens are not among the request's yet."""
        has_answered = output.finish not in (None, "error", "cancelled")
        if attempt.first_s is None and (output.token_ids or has_answered):
            self.health.answered(attempt.replica)
        # An answer that comes as a whole may not say how many it holds.
        if not output.token_ids and (entry.request.tells_progress or not has_answered):
            return
        attempt.heard_s = now
        if attempt.first_s is None:
            attempt.first_s = now
            self.hedges.began(entry, attempt, output.num_cached_tokens, now)
            times = self._placement.slowness(attempt.replica)
            self.stragglers.note(attempt.replica, times, now)
        attempt.num_said += len(output.token_ids)

    def ended(self, entry: Entry, attempt: Attempt) -> None:
        """It has all its tokens."""
        self.hedges.ended(entry)
        self.health.ended(attempt.replica)

    def left_alone(self, attempt: Attempt, now: float) -> None:
        """The other one of two attempts is over, and said nothing."""
        if self._config.hedging and attempt.first_s is None:
            self._alarms.set(now + _SOONEST_S, "late", attempt.sent_id)

    def ready(self, name: str, now: float) -> None:
        """A replica was started, and can take requests."""
        self.health.heard(name, now)
        self.health.recovered(name)

    def failed(self, name: str, now: float) -> None:
        """A replica, at a request; or it was lost."""
        if self.health.failed(name, now):
            self._give_up(name)

    def refused(self, name: str, now: float) -> None:
        """A replica has too much to do."""
        if self.health.refused(name, now):
            self._give_up(name)

    def stuck(self, name: str, is_stuck: bool, now: float) -> list[Effect]:
        """A replica said itself that it cannot go on for now, or that it can again."""
        self._replicas[name].is_stuck = is_stuck
        if not is_stuck:
            self.health.recovered(name)
            self._placement.restarted(name)
            return []
        if not self._has_others(name):
            self._listen_to(name, now + _AGAIN_S)
            return []
        return self._rescue_from(name, self._attempts_at(name), now)

    def held(self, name: str, sent_id: str, is_held: bool, now: float) -> list[Effect]:
        """What an attempt says is not read for now, or is again."""
        _, attempt = self._attempts.of(sent_id)
        if attempt is None or attempt.replica != name:
            return []
        attempt.is_held = is_held
        if not is_held:
            # That time is no gap of its own, and it may be the only one that has anything to say.
            if attempt.first_s is not None and attempt.heard_s is not None:
                attempt.first_s += now - attempt.heard_s
                attempt.heard_s = now
            self.health.heard(name, now)
            if name not in self._listened_to:
                self._listen_to(name, now + LEAST_SILENCE_S)
        return []

    def outrun(self, entry: Entry, winner: Attempt, now: float) -> None:
        """One of two attempts said the next token."""
        self.hedges.won(entry, winner, now)
        loser = entry.lead if winner is entry.rival else None
        if loser is not None and entry.request.tells_progress:
            # Without the attempt that waits there, it would look as if it had time.
            self._outrun[loser.replica] = loser.heard_s or loser.sent_s
            self._alarms.set(now, "outrun", loser.replica)

    def look(self, now: float) -> list[Effect]:
        """At what is due."""
        has_slept = self.health.looked(now)
        effects: list[Effect] = [*self.stragglers.news(now)]
        for kind, name in self._alarms.due(now):
            match kind:
                case "late" if has_slept:
                    self._alarms.set(now + _SOONEST_S, kind, name)
                case "late":
                    effects += self._look_at_late(name, now)
                case "silent":
                    effects += self._look_at_replica(name, now)
                case "outrun":
                    since_s = self._outrun.pop(name, now)
                    if self.health.has_not_spoken_since(name, since_s):
                        self._doubt(name, now)
                case "trial" if self._replicas[name].is_stuck:
                    self._alarms.set(now + _AGAIN_S, kind, name)
                case "trial":
                    again_s = self.health.may_be_tried(name, now)
                    if again_s is not None:
                        self._alarms.set(again_s, "trial", name)
        return effects

    # --- attempts ---

    def _is_wanted(self, kind: Kind, name: str) -> bool:
        if kind != "late":
            return True
        _, attempt = self._attempts.of(name)
        return attempt is not None and attempt.first_s is None

    def _look_at_late(self, sent_id: str, now: float) -> list[Effect]:
        entry, attempt = self._attempts.of(sent_id)
        if entry is None or attempt is None:
            return []  # ended by what was looked at just now
        waited_s = now - attempt.sent_s
        # How long they take may have been seen since.
        patience_s = self._patience_s(entry, attempt)
        hushed_s = min(self._hushed_at(entry, attempt), now + patience_s - waited_s)
        if now < hushed_s:
            self._alarms.set(max(hushed_s, now + _SOONEST_S / 2), "late", sent_id)
            return []
        effects = self._hedge(entry, attempt, max(waited_s, patience_s), now)
        if not effects:
            self._alarms.set(now + max(_PATIENCE * waited_s, _SOONEST_S), "late", sent_id)
        return effects

    def _hushed_at(self, entry: Entry, attempt: Attempt) -> float:
        """When a first token need not be waited for, as its replica says nothing of others."""
        name, streams = attempt.replica, entry.request.tells_progress
        if not streams or not self._replicas[name].is_sound:
            return math.inf
        there = [each for at, each in self._attempts_at(name) if at.request.tells_progress]
        hushed_s = self.health.hushed_at(name, there, self._placement.step_s(name))
        return math.inf if hushed_s is None else hushed_s

    def _patience_s(self, entry: Entry, attempt: Attempt) -> float:
        return self._lateness(entry).patience_s(attempt.predicted_s)

    def _lateness(self, entry: Entry) -> Lateness:
        return self._patience.of(tells_progress=entry.request.tells_progress)

    def _hedge(self, entry: Entry, attempt: Attempt, waited_s: float, now: float) -> list[Effect]:
        if entry.request.request_id in self._moves:
            return []  # it is about to leave
        return self.hedges.hedge(entry, attempt, waited_s, now)

    # --- replicas ---

    def _look_at_replica(self, name: str, now: float) -> list[Effect]:
        """Whether it is silent, or a stream there is."""
        self._listened_to.discard(name)
        self.health.look(name)
        there = self._attempts_at(name)
        streams = [
            (entry, each)
            for entry, each in there
            if entry.request.tells_progress and not each.is_held
        ]
        if self._replicas[name].is_sound:
            step_s = self._placement.step_s(name)
            silent_s = self.health.silent_at(name, [each for _, each in streams], step_s)
            if silent_s is None:
                return []
            if now < silent_s:
                self._listen_to(name, max(silent_s, now + _SOONEST_S))
                return self._look_at_streams(streams, step_s, now)
        is_trusted = self._replicas[name].is_stuck and not self.health.is_in_doubt(name)
        if not there and not is_trusted:
            return []
        if not self._has_others(name):
            self._listen_to(name, now + _AGAIN_S)
            return []
        return self._rescue_from(name, there, now)

    def _rescue_from(
        self, name: str, there: list[tuple[Entry, Attempt]], now: float
    ) -> list[Effect]:
        self._doubt(name, now)
        self._listen_to(name, now + _AGAIN_S)
        effects: list[Effect] = []
        for entry, attempt in there:
            if all(self.health.is_in_doubt(each.replica) for each in entry.attempts):
                is_gone = self._is_surely_gone(entry, attempt, now)
                rescue = self.hedges.rescue(entry, attempt, now, is_surely_gone=is_gone)
                if rescue:
                    rescue += self._moves.end(entry.request.request_id)
                effects += rescue
        return effects

    def _is_surely_gone(self, entry: Entry, attempt: Attempt, now: float) -> bool:
        """Its replica, which does not just pause."""
        name = attempt.replica
        if self._replicas[name].is_stuck:
            return True
        silent_s = self.health.silence_s(name, now)
        if self._config.hedging:
            return silent_s >= SURELY_SILENT_S
        # Nothing is computed twice for speed then: a Step may still be done after the pause.
        if attempt.first_s is None and entry.request.tells_progress:
            silent_s = min(silent_s, now - attempt.sent_s - self._patience_s(entry, attempt))
        return silent_s >= SURELY_SILENT_S + self._placement.step_s(name)

    def _doubt(self, name: str, now: float) -> None:
        if not self.health.is_in_doubt(name):
            self.stats.doubted += 1
            self._placement.interrupted(name)
            self.health.doubt(name, now)
            self._give_up(name)

    def _give_up(self, name: str) -> None:
        """For a while: who came back since is needed, and it will be tried again."""
        self.health.believe_who_answered()
        self._alarms.set(self.health.ends_s(name), "trial", name)

    def _look_at_streams(
        self, there: list[tuple[Entry, Attempt]], step_s: float, now: float
    ) -> list[Effect]:
        effects: list[Effect] = []
        for entry, attempt in there:
            if attempt.heard_s is not None:
                silent_s = now - max(attempt.heard_s, self.health.awake_s)
                if silent_s >= stalled_after_s(mean_gap_s(attempt), step_s):
                    effects += self._hedge(entry, attempt, silent_s, now)
        return effects

    def _attempts_at(self, name: str) -> list[tuple[Entry, Attempt]]:
        """Those that were sent."""
        found = []
        for request_id in self._replicas[name].outstanding:
            entry = self._entries[request_id]
            move = self._moves.of(request_id)
            if move is None or move.why != "prefix":  # which waits for KV
                found += [(entry, each) for each in entry.attempts if each.replica == name]
        return found

    def _has_others(self, name: str) -> bool:
        """Who could go on with what is there."""
        return any(
            each.is_sound and not each.is_drained
            for each in self._replicas.values()
            if each.name != name
        )

    def _listen_to(self, name: str, when: float) -> None:
        self._listened_to.add(name)
        self._alarms.set(when, "silent", name)
