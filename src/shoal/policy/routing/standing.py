"""How one replica stands: what it has, what waits there, how fast it is; and what follows.

    prompts   computed one after the other, in chunks; a chunk shares its Step with what decodes
    seats     sequences at once; who comes when all are taken waits until so many have ended
    KV        the same, by tokens

`column` is what a decision asks of it. Learned from whole stretches of work: from one first or
last token of a request to the next, so that it does not matter how tokens in between are told.
Told the time; knows nothing of requests' names.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shoal.core.speed import Speed
from shoal.core.stats import Computed
from shoal.policy.batching import prompts_share
from shoal.policy.routing.learning import Correction

UNKNOWN = Speed(step_s=0.02, token_s=2e-4, row_s=2e-4, context_s=1e-7)
"""Where nobody knows: of some device. What is learned turns it into this one's."""

_LATELY_S = 10.0
_FEWEST_BEGINS, _BEGINS_KEPT = 4, 9
_MOST_SHARE = 0.75
_PATIENCE, _PATIENCE_S = 1.3, 0.05
_PROBE_EVERY_S = 4.0
KNEE, STEEPNESS = 0.7, 4.0
"""Of what a share of a target costs: more than the share, beyond the knee."""
_NEVER = float("inf")


@dataclass(slots=True)
class Stay:
    """A request at a replica, or on its way there.

    Attributes:
        tokens, pairs: of its prompt that are to be computed, as far as known, and pairs of them and
            those before.
        prompt: tokens that are known; `output`: that it is expected to give.
        is_over: its replica said that it is.
    """

    tokens: float
    pairs: float
    prompt: int
    output: float
    has_begun: bool = False
    is_over: bool = False

    @property
    def context(self) -> float:
        """Tokens that it has while it decodes, on average."""
        return self.prompt + self.output / 2


@dataclass(slots=True)
class Standing:
    """
    Attributes:
        seats, room, chunk: sequences, tokens of KV, tokens in a Step, at most.
        is_even: prompts are cut smaller beside those that decode, to keep `tpot_target_s` if there
            is one (`policy/batching.py`).
        waiting: stays without a first token, the oldest first; `queued`, `queued_pairs`: of them.
        since_s: when the oldest one's turn came.
        begun: stays with one; `decoding`: tokens of their contexts.
        context, output: of all.
        learned_s: when a stretch of work was last learned from; None: it has been cut short.
        said: tokens since then, of those that decode; `came`, `came_pairs`: of prompts that got
            their first one.
        computed, learned: all that it has computed, as it told last, and when it was last learned
            from; None: it does not tell.
        ahead: tokens of prompts that wait, which it has computed already.
        begins: when prompts were done lately, while others waited, and their tokens;
            `before_token_s`: `seen_token_s`, of others before them.
        prompt_share: of its time that prompts took, at `rated_s`; `rate`: requests a second.
    """

    speed: Speed
    correction: Correction
    seats: int = 1
    room: int = 1
    chunk: int = 1
    is_even: bool = False
    tpot_target_s: float | None = None
    waiting: dict[int, Stay] = field(default_factory=dict)
    queued: float = 0.0
    queued_pairs: float = 0.0
    since_s: float = 0.0
    begun: int = 0
    decoding: float = 0.0
    context: float = 0.0
    output: float = 0.0
    learned_s: float | None = None
    said: int = 0
    came: float = 0.0
    came_pairs: float = 0.0
    computed: Computed | None = None
    learned: Computed | None = None
    ahead: float = 0.0
    begins: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_BEGINS_KEPT))
    before_token_s: float = 0.0
    sent_s: float = -_NEVER
    prompt_share: float = 0.0
    rate: float = 0.0
    rated_s: float = 0.0

    @property
    def seen_token_s(self) -> float:
        """That a token of a prompt lately took with all that went on beside; 0: not seen."""
        if len(self.begins) < _FEWEST_BEGINS:
            return self.before_token_s
        tokens = sum(each for _, each in self.begins) - self.begins[0][1]
        return (self.begins[-1][0] - self.begins[0][0]) / tokens

    @property
    def num(self) -> int:
        return self.begun + len(self.waiting)

    @property
    def is_unproven(self) -> bool:
        """Nobody knew how fast it is, and nothing was seen."""
        return self.correction.usual is None

    def alone_s(self, num_tokens: float) -> float:
        """TTFT of a prompt of so many tokens that comes to nobody else, as it usually is."""
        speed, steps = self.speed, num_tokens // self.chunk + 1
        prompt_s = speed.token_s * num_tokens + speed.pair_s * num_tokens * num_tokens / 2
        return self.correction.usually(prompt_s, speed.step_s * steps)

    def alone_gap_s(self, num_tokens: float) -> float:
        """TPOT of the same."""
        return self.correction.usually(0.0, self.speed.step(0, 1, num_tokens))

    # --- what happens ---

    def put(self, stay: Stay, now: float) -> None:
        """A request is sent."""
        if not self.num:
            self._start_over(now)
        if not self.waiting:
            self.since_s = now
            self.before_token_s = self.seen_token_s
            self.begins.clear()
            self.begins.append((now, 0.0))
        self.waiting[id(stay)] = stay
        self.queued += stay.tokens
        self.queued_pairs += stay.pairs
        self.context += stay.context
        self.output += stay.output
        self.sent_s = now
        self._note_rate(stay, now)

    def begin(self, stay: Stay, num_cached: int | None, now: float) -> None:
        """Its first token came; so much of its prompt was cached."""
        if num_cached is not None:
            computed = max(stay.prompt - num_cached, 1.0)
            pairs = computed * (stay.prompt - computed / 2)
        else:
            computed, pairs = stay.tokens, stay.pairs
        self.came += computed
        self.came_pairs += pairs
        self.ahead -= computed
        self.assume_begun(stay, now)

    def assume_begun(self, stay: Stay, now: float) -> None:
        """That of a request which says nothing before it ends is not seen."""
        self._unqueue(stay, now)
        self.begins.append((now, stay.tokens))
        stay.has_begun = True
        self.begun += 1
        self.decoding += stay.context

    def end(self, stay: Stay, now: float, *, is_cut: bool = False) -> None:
        """It is over; `is_cut`: not by the replica, which says nothing of how fast it is."""
        if stay.has_begun:
            self.begun -= 1
            self.decoding -= stay.context
        else:
            self._unqueue(stay, now)
        self.context -= stay.context
        self.output -= stay.output
        if is_cut:
            self.learned_s, self.said = None, 0
        if not self.num:
            self.queued = self.queued_pairs = self.decoding = self.context = self.output = 0.0

    def interrupt(self, now: float) -> None:
        """It does nothing, and is not to be thought slow for it."""
        self.learned_s, self.said = None, 0
        self.before_token_s = self.seen_token_s
        self.begins.clear()
        self.begins.append((now, 0.0))

    def learn(self, now: float, num_begun: int, context: float) -> None:
        """A request got its first or its last token: what the work until now took.

        Args:
            num_begun, context: what decoded meanwhile, and tokens of each, on average.
        """
        if self.learned_s is None:
            self._start_over(now)
            return
        elapsed_s, speed = now - self.learned_s, self.speed
        if self.computed is not None and self.learned is not None:
            steps = float(self.computed.steps - self.learned.steps)
            tokens = float(self.computed.prompt_tokens - self.learned.prompt_tokens)
            pairs = self.computed.prompt_pairs - self.learned.prompt_pairs
        elif self.waiting and not self.came:
            return  # some of the time went into prompts that wait still, nobody knows how much
        else:
            tokens, pairs = self.came, self.came_pairs
            steps = max(self.said / num_begun if num_begun else 0.0, tokens / self.chunk, 1.0)
        rest_s = speed.step_s * steps + (speed.row_s + speed.context_s * context) * self.said
        prompts_s = speed.token_s * tokens + speed.pair_s * pairs
        self.correction.note(prompts_s, rest_s, elapsed_s)
        self.ahead += tokens
        if tokens:
            self.since_s = now
        self._start_over(now)

    def _chunk(self) -> float:
        """Tokens of prompts that a Step holds beside those that decode."""
        if not self.is_even or not self.begun:
            return self.chunk
        step_s = self._decode_step_s()
        share = prompts_share(step_s, self.tpot_target_s, len(self.waiting))
        return min(share * step_s / (self.correction.prompts * self.speed.token_s), self.chunk)

    def _start_over(self, now: float) -> None:
        self.learned_s, self.said, self.came, self.came_pairs = now, 0, 0.0, 0.0
        self.learned = self.computed
        self.ahead = max(self.ahead, 0.0) if self.waiting else 0.0

    def _unqueue(self, stay: Stay, now: float) -> None:
        del self.waiting[id(stay)]
        self.queued = max(self.queued - stay.tokens, 0.0)
        self.queued_pairs = max(self.queued_pairs - stay.pairs, 0.0)
        self.since_s = now

    def _note_rate(self, stay: Stay, now: float) -> None:
        kept = _kept(now - self.rated_s)
        prompt_s = self.correction.prompts * (
            self.speed.token_s * stay.tokens + self.speed.pair_s * stay.pairs
        )
        self.prompt_share = self.prompt_share * kept + prompt_s / _LATELY_S
        self.rate = self.rate * kept + 1 / _LATELY_S
        self.rated_s = now

    # --- what follows ---

    def rate_at(self, now: float) -> float:
        """Requests a second that came lately."""
        return _kept(now - self.rated_s) * self.rate

    def keeps_from_s(self, tpot_s: float) -> float:
        """From when on those that decode have tokens so fast, with one more of them, while no
        more prompts come."""
        calm_s = self._calm_gap_s()
        if calm_s >= tpot_s:
            return _NEVER
        most_share = 1 - calm_s / tpot_s
        if min(self.prompt_share, _MOST_SHARE) <= most_share:
            return -_NEVER
        return self.rated_s + _LATELY_S * (self.prompt_share / most_share - 1)

    def longest_step_s(self) -> float:
        """Of a Step that computes as much of the prompts that wait as it may."""
        prompts_s = self.speed.token_s * min(self.queued, self._chunk())
        return self._decode_step_s() + self.correction.prompts * prompts_s

    def _decode_step_s(self) -> float:
        speed = self.speed
        rows_s = speed.row_s * self.begun + speed.context_s * self.decoding
        return self.correction.decoding * (speed.step_s + rows_s)

    def _calm_gap_s(self) -> float:
        """Between two tokens, with one sequence more and no prompts."""
        speed, rows = self.speed, min(self.num + 1, self.seats)
        others_s = speed.row_s * rows + speed.context_s * self.context
        return self.correction.decoding * (speed.step_s + others_s)

    def column(self, now: float, target_ttft_s: float, target_tpot_s: float) -> list[float]:
        """A number for each `Row` before NUM."""
        speed, factor = self.speed, self.correction
        token_s, pair_s = factor.prompts * speed.token_s, factor.prompts * speed.pair_s
        row_s, context_s = factor.decoding * speed.row_s, factor.decoding * speed.context_s
        step_s = self._decode_step_s()
        per_token = token_s + step_s / self.chunk
        if self.is_even and self.begun:
            share = prompts_share(step_s, self.tpot_target_s, len(self.waiting) + 1)
            per_token, pair_s = max(per_token, token_s + token_s / share), pair_s + pair_s / share
        head = next(iter(self.waiting.values()), None)
        head_s = 0.0 if head is None else per_token * head.tokens + pair_s * head.pairs
        waits_s = per_token * self.queued + pair_s * self.queued_pairs
        if head is not None and self.ahead:
            waits_s *= max(1 - self.ahead / self.queued, 0.0)
            at_once = len(self.waiting) if self.is_even and self.begun else 1
            head_s *= max(1 - self.ahead / (at_once * head.tokens), 0.0)
        waits_s -= min(max(now - self.since_s, 0.0), head_s)
        is_full = self.begun >= self.seats or self.context > self.room
        # Prompts take turns with what decodes: that is slower by their share of the time.
        kept = _kept(now - self.rated_s)
        dilation = 1 / (1 - min(kept * self.prompt_share, _MOST_SHARE))
        num = self.num
        gap_s = dilation * self._calm_gap_s()
        output = self.output / num if num else 1.0
        turn_s = output * gap_s
        missing = max(num + 1 - self.seats, 0)
        steep = slope(gap_s / target_tpot_s)
        harm = num * steep / target_tpot_s * dilation
        is_late = head is not None and not is_full
        looks_bad = not num and factor.looks_bad
        late_s = _PATIENCE * (head_s + 2 * step_s) + _PATIENCE_S
        # In the order of `Row`.
        return [
            now + waits_s,
            step_s * (1.5 if self.begun else 1.0),
            per_token,
            pair_s,
            missing * turn_s / self.seats,
            self.room - self.context,
            turn_s / self.context if self.context else 0.0,
            self.since_s,
            1 / late_s if is_late else 0.0,
            gap_s,
            context_s * dilation,
            harm * row_s,
            harm * context_s,
            self.begun * steep / target_tpot_s / output,
            kept * self.rate / (2 * target_ttft_s),
            self.sent_s + _PROBE_EVERY_S if looks_bad else _NEVER,
        ]


def _kept(seconds: float) -> float:
    """Of what was counted so long ago."""
    return _LATELY_S / (_LATELY_S + seconds)


def slope(share: float) -> float:
    """What a little more of a share of a target costs."""
    return 1.0 + 2 * STEEPNESS * max(share - KNEE, 0.0)
