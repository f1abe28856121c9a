"""Which replica a request is sent to, by the router's policy, and what is known of replicas for it.

    put ─► waits ─► first token ─► ... ─► last token        a stay, of each attempt
           └ predicted from how the replica stands; what it then takes is learned

Told what happens to attempts; keeps the arrays that policies see (`policy/routing`). Knows nothing
of moves, hedges or of why a request needs a place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from random import Random
from statistics import median

import numpy as np

from shoal.core.request import GenerateRequest, Output
from shoal.core.stats import Computed, Prospect
from shoal.core.step import BLOCK_SIZE
from shoal.policy.admission import Promises
from shoal.policy.routing import policy_named
from shoal.policy.routing.fleet import Ask, Fleet, Numbers, Row
from shoal.policy.routing.learning import Correction
from shoal.policy.routing.predicted import predicted, prediction
from shoal.policy.routing.standing import UNKNOWN, Standing, Stay
from shoal.policy.routing.typical import Typical
from shoal.router.loads import Loads
from shoal.router.prefix_index import PrefixIndex
from shoal.router.records import Attempt, Entry, Replica, RouterConfig
from shoal.router.vacancies import Vacancies

_LOOK_EVERY = 64
_MOVED = 0.05
_ALIKE = 0.7


@dataclass(slots=True)
class _Heard:
    """What a replica's outputs are read against: how it stood before them."""

    number: int
    begun: int
    context: float
    is_telling: bool = False


class Placement:
    """
    Args:
        replicas, loads: the router's.
        rng: for policies that leave something to chance.

    Attributes:
        promises: of first tokens, made to those who wait.

    Raises:
        ConfigError: there is no policy of that name.
    """

    def __init__(
        self, config: RouterConfig, replicas: Mapping[str, Replica], loads: Loads, rng: Random
    ) -> None:
        self._policy, self._slo = policy_named(config.policy), config.slo
        self._replicas, self._loads, self._rng = tuple(replicas.values()), loads, rng
        self._numbers = {each.name: number for number, each in enumerate(self._replicas)}
        self._speeds = [config.speeds.get(each.name) for each in self._replicas]
        self._standings = [self._fresh(number) for number in range(len(self._replicas))]
        self._stays: dict[str, tuple[int, Stay]] = {}
        self._fleet = Fleet(len(self._replicas))
        self._predicts = self._policy is predicted
        self._vacancies = Vacancies(config.slo, self._fleet, loads, predicts=self._predicts)
        self.promises = Promises()
        self._index = PrefixIndex(len(self._replicas))
        self._typical = Typical()
        self._now = 0.0
        self._heard: _Heard | None = None
        self._asked: tuple[GenerateRequest, int, Ask] | None = None
        self._has_changed = False

    def at(self, now: float) -> None:
        """The time of what is told next."""
        self._now = now

    # --- choosing ---

    def choose(self, entry: Entry, but_not: Collection[str] = ()) -> Replica | None:
        """Where a request goes; None: there is nobody to send it to."""
        fit = self._fit(entry.has_begun, but_not)
        if not len(fit):
            return None
        if entry.has_begun:
            return self._soonest(fit, self._ask(entry))
        fleet = self._fleet
        if fleet.num_decided % max(_LOOK_EVERY, fleet.num_replicas) == 0:
            self._aim()
        fit = self._in_time(fit, entry)
        with_room = self._vacancies.among(fit, self._now)
        fit = with_room if len(with_room) else fit
        fleet.table[Row.NUM] = self._loads.counts
        number = self._policy(fleet, fit, self._ask(entry), self._now, self._rng)
        fleet.num_decided += 1
        return self._replicas[number]

    def soonest(self, entry: Entry, but_not: Collection[str] = ()) -> Replica | None:
        """Where the next token of a request would come first; None: there is nobody to send it
        to."""
        fit = self._fit(entry.has_begun, but_not)
        return self._soonest(fit, self._ask(entry)) if len(fit) else None

    def _soonest(self, fit: Numbers, ask: Ask) -> Replica:
        """Whoever was interrupted goes where the next token comes first, whatever the policy."""
        cached, rows = None if ask.cached is None else ask.cached[fit], self._fleet.table[:, fit]
        ttft_s = prediction(list(rows), ask, cached, self._now, np.maximum).ttft_s
        return self._replicas[int(fit[ttft_s.argmin()])]

    def waited(self, seconds: float) -> None:
        """So long has the request that waits for a replica longest."""
        self._vacancies.waited(seconds)

    def has_anybody(self, *, has_begun: bool) -> bool:
        """Whether there is a replica that requests may be sent to, full or not."""
        return len(self._fit(has_begun)) > 0

    def has_room(self, entry: Entry | None = None, *, has_begun: bool = False) -> bool:
        """Whether a replica could begin a request soon, were it sent there now; one where that is
        in time for it, if there are any. None: any request that has begun, or has not."""
        fit = self._fit(has_begun if entry is None else entry.has_begun)
        if entry is not None:
            fit = self._in_time(fit, entry)
        return len(self._vacancies.among(fit, self._now)) > 0

    def _in_time(self, fit: Numbers, entry: Entry) -> Numbers:
        """Where the first token of one that had to wait probably is in time, or comes first; all,
        once it is late."""
        if entry.due_s is None or entry.promise is None or not (self._predicts and len(fit)):
            return fit
        left_s = (entry.due_s - self._now) / self.promises.margin
        return (
            fit if left_s < 0 else self._vacancies.in_time(fit, self._ask(entry), left_s, self._now)
        )

    def requests_per_s(self) -> float:
        """That replicas take together, about."""
        fit = self._fit(False)
        return max(float(self._fleet.table[Row.WEIGHT, fit].sum()), 1e-3)

    def output_of(self, request: GenerateRequest) -> float:
        """Tokens that are expected of it."""
        return self._typical.output_of(request)

    def soonest_s(self, entry: Entry | None) -> float | None:
        """The shortest predicted TTFT of one that came now, or of any; None: nobody is there."""
        fit = self._fit(False)
        if not len(fit):
            return None
        ask = Ask(1, 1.0) if entry is None else self._ask(entry)
        return self._vacancies.soonest_s(fit, ask, self._now)

    def predicted_s(self, entry: Entry, replica: str) -> float:
        """Until that replica says something of a request, were it sent there now: its TTFT, or all
        the time that a whole answer takes."""
        return self._predicted_s(self._ask(entry), self._numbers[replica], entry)

    def step_s(self, replica: str) -> float:
        """Of a Step there that computes as much of the prompts that wait as it may."""
        return self._standings[self._numbers[replica]].longest_step_s()

    def slowness(self, replica: str) -> float:
        """Times as long as is usual for it that it takes lately."""
        correction = self._standings[self._numbers[replica]].correction
        return correction.factor / correction.usual if correction.usual else 1.0

    # --- what happens to replicas ---

    def ready(self, replica: Replica) -> None:
        """It can take requests, and has nothing."""
        number, info = self._numbers[replica.name], replica.info
        assert info is not None, "it said what it can carry"
        standing = self._standings[number] = self._fresh(number)
        standing.seats, standing.chunk = info.max_num_seqs, info.max_num_batched_tokens
        standing.is_even, standing.tpot_target_s = info.is_even, info.tpot_target_s
        self._vacancies.ready(number, info)
        standing.room = info.num_kv_blocks * BLOCK_SIZE
        self._index.make_room(number, standing.room)
        self._fleet_changed()
        self._liken()

    def lost(self, replica: str) -> None:
        """It is gone, with all it had."""
        number = self._numbers[replica]
        self._index.forget(number)
        self._stays = {name: each for name, each in self._stays.items() if each[0] != number}
        self._standings[number] = self._fresh(number)
        self._fleet_changed()

    def restarted(self, replica: str) -> None:
        """Its workers were: what it had computed is gone."""
        self._index.forget(self._numbers[replica])

    def interrupted(self, replica: str) -> None:
        """It says nothing: how fast it is will be seen when it does again."""
        number = self._numbers[replica]
        self._standings[number].interrupt(self._now)
        self._renew(number)

    # --- what happens to attempts ---

    def put(self, entry: Entry, attempt: Attempt) -> None:
        """It is bound to its replica."""
        number, ask = self._numbers[attempt.replica], self._ask(entry)
        cached = 0.0 if ask.cached is None else float(ask.cached[number])
        new = max(ask.num_tokens - cached, 1.0)
        stay = Stay(
            tokens=new,
            pairs=new * (ask.num_tokens - new / 2),
            prompt=ask.num_tokens,
            output=ask.output_tokens,
        )
        attempt.predicted_s = self._predicted_s(ask, number, entry)
        self._stays[attempt.sent_id] = number, stay
        self._standings[number].put(stay, self._now)
        if not entry.request.tells_progress:
            self._standings[number].assume_begun(stay, self._now)
        self._fleet.table[Row.SENT, number] += 1
        self._index.note(number, _tokens(entry), entry.request.salt, entry.granules)
        self._renew(number)

    def left(self, attempt: Attempt) -> None:
        """It has ended, or is not wanted any more."""
        number, stay = self._stays.pop(attempt.sent_id)
        self._standings[number].end(stay, self._now, is_cut=not stay.is_over)
        self._renew(number)

    def refused(self, attempt: Attempt) -> None:
        """Its replica computes nothing of it: what the others take is learned as if it had not
        been there."""
        self._stays[attempt.sent_id][1].is_over = True

    def listen(self, replica: str, computed: Computed | None) -> None:
        """It is about to say something (`said`, then `learn`); by now it has computed so much."""
        number = self._numbers[replica]
        standing = self._standings[number]
        standing.computed = computed
        context = standing.decoding / standing.begun if standing.begun else 0.0
        self._heard = _Heard(number, standing.begun, context)

    def said(self, entry: Entry, attempt: Attempt, output: Output) -> None:
        number, stay = self._stays[attempt.sent_id]
        standing, heard = self._standings[number], self._heard
        assert heard is not None, "it was listened to"
        if entry.request.tells_progress:
            standing.said += len(output.token_ids)
        if output.token_ids and not stay.has_begun:
            standing.said -= 1
            if entry.promise is not None:
                self.promises.came(entry.promise, self._now)
                entry.promise = None
            standing.begin(stay, output.num_cached_tokens, self._now)
            heard.is_telling = True
        if output.finish is not None:
            has_answered = output.error is None and stay.has_begun
            stay.is_over |= has_answered
            heard.is_telling |= has_answered and entry.request.tells_progress
            if has_answered and entry.has_begun:
                self._typical.note_output(entry.request, len(entry.output_ids))
                self._index.note(number, _tokens(entry), entry.request.salt, entry.granules)

    def learn(self) -> None:
        """It has said all for now."""
        heard, self._heard = self._heard, None
        if heard is not None and heard.is_telling:
            standing = self._standings[heard.number]
            was_unproven = standing.is_unproven
            standing.learn(self._now, heard.begun, heard.context)
            self._renew(heard.number)
            if was_unproven and not standing.is_unproven:
                self._liken()

    # --- seen from outside ---

    def prospects(self, now: float) -> dict[str, Prospect]:
        """Of each replica that is alive."""
        self._now = now
        self._fit(has_begun=False)
        total = sum(each.rate_at(now) for each in self._standings) or 1.0
        ask = Ask(round(self._typical.prompt), self._typical.output)
        return {
            each.name: Prospect(
                prompts=self._standings[number].correction.prompts,
                decoding=self._standings[number].correction.decoding,
                share=self._standings[number].rate_at(now) / total,
                ttft_s=self._predicted_s(ask, number),
            )
            for number, each in enumerate(self._replicas)
            if each.alive
        }

    def check_integrity(self, sent_ids: Collection[str]) -> None:
        """Raises AssertionError unless these are all that there is; for tests."""
        assert self._stays.keys() == set(sent_ids)
        for number, standing in enumerate(self._standings):
            stays = [stay for at, stay in self._stays.values() if at == number]
            assert standing.begun == sum(stay.has_begun for stay in stays)
            assert len(standing.waiting) == len(stays) - standing.begun

    # --- inside ---

    def _fresh(self, number: int) -> Standing:
        speed = self._speeds[number]
        return Standing(speed or UNKNOWN, Correction(is_known=speed is not None))

    def _ask(self, entry: Entry) -> Ask:
        """The latest one is kept: who is chosen for is bound next."""
        request, num_tokens = entry.request, entry.num_tokens
        asked, asked_tokens, ask = self._asked or (None, 0, None)
        if ask is not None and asked is request and asked_tokens == num_tokens:
            return ask
        cached = self._index.cached(_tokens(entry), request.salt, entry.granules)
        expected = self._typical.output_of(request)
        left = max(expected - len(entry.output_ids), expected / 4, 1.0)
        ask = Ask(num_tokens, left, cached)
        self._asked = request, num_tokens, ask
        return ask

    def _predicted_s(self, ask: Ask, number: int, entry: Entry | None = None) -> float:
        cached = None if ask.cached is None else float(ask.cached[number])
        column: list[float] = self._fleet.table[:, number].tolist()
        found = prediction(column, ask, cached, self._now, max)
        if entry is None or entry.request.tells_progress:
            return found.ttft_s
        return found.ttft_s + found.tpot_s * (ask.output_tokens - 1)

    def _liken(self) -> None:
        """Those of which nobody knows anything are taken for like those that were seen."""
        guessed = [each for each in self._standings if each.speed is UNKNOWN]
        seen = [each.correction.factor for each in guessed if not each.is_unproven]
        if seen and len(seen) < len(guessed):
            for each in guessed:
                if each.is_unproven:
                    each.correction.assume(median(seen))
        self._has_changed = True

    def _fleet_changed(self) -> None:
        self._fleet.table[Row.SENT] = 0
        self._has_changed = True

    def _fit(self, has_begun: bool, but_not: Collection[str] = ()) -> Numbers:
        """Replicas that a request may be sent to, as the table has them."""
        if self._has_changed:  # once, however many came
            self._has_changed = False
            self._aim(is_certain=True)
        return self._loads.fitting(has_begun, but_not)

    def _aim(self, *, is_certain: bool = False) -> None:
        """At latencies that were asked for, or that the slowest can keep; and by what speeds."""
        alive = [
            self._standings[number] for number, each in enumerate(self._replicas) if each.alive
        ]
        ttft_s, tpot_s = self._typical.targets(alive)
        if self._slo is not None:
            ttft_s, tpot_s = self._slo.ttft_s or ttft_s, self._slo.tpot_s or tpot_s
        fleet = self._fleet
        speeds = np.array([1 / self._typical.request_s(each) for each in self._standings])
        fleet.table[Row.WEIGHT] = speeds
        shares = speeds / speeds.max()
        self._loads.weights[:] = np.where(shares >= _ALIKE, 1.0, shares)
        old = fleet.target_ttft_s, fleet.target_tpot_s
        if is_certain or max(abs(ttft_s / old[0] - 1), abs(tpot_s / old[1] - 1)) > _MOVED:
            fleet.target_ttft_s, fleet.target_tpot_s = ttft_s, tpot_s
            for number in range(len(self._standings)):
                self._renew(number)

    def _renew(self, number: int) -> None:
        fleet, standing = self._fleet, self._standings[number]
        fleet.table[: Row.NUM, number] = standing.column(
            self._now, fleet.target_ttft_s, fleet.target_tpot_s
        )
        self._vacancies.renew(number, standing)


def _tokens(entry: Entry) -> tuple[int, ...]:
    prompt = entry.request.prompt_ids
    return (*prompt, *entry.output_ids) if entry.output_ids else prompt
