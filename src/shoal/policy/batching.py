"""What goes into a Step: how many tokens of prompts, and how many sequences at once.

    even        while others decode, prompts are cut so that a Step takes little longer than their
                decoding alone; nobody's long prompt holds up a stream that runs
    continuous  as much of the prompts as a Step may hold: best for prompts, streams stutter
    article     continuous, but no more sequences at once than rate x target latency, and new ones
                wait a few ms for others (a rule that articles give; here to be compared with)

Of `even`, with D seconds for a Step that only decodes and M for one more token of a prompt:

    tokens      share · D / M  for each prompt that waits; their Steps take D · (1 + share)
    so          a prompt alone among streams takes 1 + 1 / share times what it takes alone
    many wait   their shares add up: under load Steps become as full as they may be

D and M are what Steps took lately. Knows nothing of sequences or of queues.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from copy import copy
from statistics import median

from shoal.core.options import Batching

_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 2048
# Chunks of one long prompt are on several stages at once only if there are several.
_PIPELINE_STEP_TOKENS = 128

SHARE = 0.8
"""Steps with a prompt take 1.8 times as long, the prompt 2.4 times as long as alone."""
LEAST_SHARE = 0.75
"""Whatever TPOT is wanted: a prompt takes 2.5 times as long as alone at most."""
WITHIN_TPOT = 0.9
"""Of a TPOT that is to be kept, that Steps are made to take: some take longer than they should."""

NUM_DECODES_KEPT = 4
_STEPS_BETWEEN_DECODES = 8
_STEPS_UNTIL_KNOWN = 4
_OTHER_NUMBER = 1.3
_KEPT = 0.85
_TOKENS_COUNTED = 32
_MOST_EXCESS = 3.0
_FIRST_GUESS, _LEAST = 1 / 32, 1 / 1024

_TARGET_S = 1.0
_GATHER_S = 0.005
_ARRIVALS_KEPT = 64


def step_tokens(*, is_cuda: bool, num_stages: int, max_num_seqs: int) -> int:
    """Tokens that a Step may hold, where nobody says: enough to keep a device's arithmetic busy,
    and one for every sequence.

    Args:
        is_cuda: all devices are GPUs.
    """
    if is_cuda:
        wanted = _CUDA_STEP_TOKENS
    else:
        wanted = _CPU_STEP_TOKENS if num_stages == 1 else _PIPELINE_STEP_TOKENS
    return max(wanted, max_num_seqs)


def prompts_share(decoding_s: float, tpot_s: float | None, num_prompts: int) -> float:
    """Time that `even` gives to prompts in a Step, over what its decoding takes.

    Args:
        tpot_s: that is to be kept.
        num_prompts: that wait to be computed.
    """
    if tpot_s is None:
        return SHARE * max(num_prompts, 1)
    return max(WITHIN_TPOT * tpot_s / decoding_s - 1, LEAST_SHARE)


class StepTimes:
    """What Steps of one route took lately, and how much of prompts the next one had better hold.

    Who decodes is measured by Steps without prompts. While every Step holds some, one without is
    put in from time to time, or when there are many more or fewer that decode.

    Args:
        tpot_s: that those who decode are to keep; None: little more than they have alone.
    """

    def __init__(self, tpot_s: float | None = None) -> None:
        self._tpot_s = tpot_s
        self._decodes: deque[float] = deque(maxlen=NUM_DECODES_KEPT)
        self._decoding_s = 0.0  # their median, if there are any
        # Of Steps with prompts: tokens of those, and seconds beyond those of decoding.
        self._tokens = 0.0
        self._excess_s = 0.0
        # The last Step without prompts: sequences that ran, Steps handed out since.
        self._num_running = 0
        self._num_since = 0

    def copy(self) -> StepTimes:
        """One that goes its own way from now on."""
        other = copy(self)
        other._decodes = self._decodes.copy()
        return other

    def handed_out(self, num_running: int, num_prompt_tokens: int) -> None:
        """A Step with so many tokens of prompts, while so many sequences run on the route."""
        if num_prompt_tokens:
            self._num_since += 1
        else:
            self._num_since, self._num_running = 0, num_running

    def took(self, num_prompt_tokens: int, seconds: float) -> None:
        """A Step came back."""
        if seconds <= 0:
            return
        if num_prompt_tokens:
            self._note_prompts(num_prompt_tokens, seconds)
        else:
            self._decodes.append(seconds)
            self._decoding_s = median(self._decodes)

    def decoded(self, num_running: int, seconds: Sequence[float]) -> None:
        """Steps without prompts were handed out and came back, as many as there are seconds."""
        self.handed_out(num_running, 0)
        for each in seconds[-NUM_DECODES_KEPT:]:
            self.took(0, each)

    def prompt_tokens(self, num_running: int, num_prompts: int, *, decodes: bool) -> int | None:
        """How many a Step had better hold while others decode; None: as many as it may.

        Args:
            num_running: on the route.
            num_prompts: that wait to be computed.
            decodes: the Step has rows that do.
        """
        if decodes and self._is_unsure(num_running):
            return 0
        if not self._decodes:
            return None
        decoding_s = self._decoding_s
        room_s = prompts_share(decoding_s, self._tpot_s, num_prompts) * decoding_s
        return max(math.floor(room_s / self._token_s(decoding_s)), 1)

    def _is_unsure(self, num_running: int) -> bool:
        """Whether it is time to see again what decoding takes."""
        ratio = num_running / max(self._num_running, 1)
        is_known = bool(self._decodes) and 1 / _OTHER_NUMBER <= ratio <= _OTHER_NUMBER
        return self._num_since >= (_STEPS_BETWEEN_DECODES if is_known else _STEPS_UNTIL_KNOWN)

    def _note_prompts(self, num_tokens: int, seconds: float) -> None:
        """Sums in which the latest Steps count most: what single ones take is noisy."""
        counted = min(num_tokens, _TOKENS_COUNTED)
        alone_s = self._decoding_s
        excess_s = (seconds - alone_s) * counted / num_tokens
        if self._tokens:
            # A hiccup of the machine is no news of tokens.
            excess_s = min(excess_s, _MOST_EXCESS * self._token_s(alone_s) * counted)
        self._tokens = _KEPT * self._tokens + counted
        self._excess_s = _KEPT * self._excess_s + excess_s

    def _token_s(self, decoding_s: float) -> float:
        """That one more token of a prompt takes."""
        found = self._excess_s / self._tokens if self._tokens else decoding_s * _FIRST_GUESS
        return max(found, decoding_s * _LEAST)


class Seats:
    """How many sequences may run at once.

    Args:
        most: whatever the rule says.
    """

    def __init__(self, batching: Batching, most: int) -> None:
        self._most = most
        self._is_gathering = batching == "article"
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS_KEPT)
        self._num_arrived = 0
        self._since: float | None = None

    @property
    def next_s(self) -> float | None:
        """When those that wait have waited for others long enough."""
        return None if self._since is None else self._since + _GATHER_S

    def open(self, num_arrived: int, num_running: int, num_waiting: int, now: float) -> int:
        """Sequences that may run; as many as do, while others are waited for.

        Args:
            num_arrived: ever.
        """
        if not self._is_gathering:
            return self._most
        num_new, self._num_arrived = num_arrived - self._num_arrived, num_arrived
        self._arrivals += [now] * num_new
        if num_new and self._since is None:
            self._since = now
        most, due_s = min(self._batch_size(), self._most), self.next_s
        if due_s is not None and now < due_s and 0 < num_waiting < most - num_running:
            return num_running
        self._since = None
        return most

    def _batch_size(self) -> int:
        """As many as arrive within the target latency."""
        if len(self._arrivals) < 2 or self._arrivals[-1] <= self._arrivals[0]:
            return 1
        rate = (len(self._arrivals) - 1) / (self._arrivals[-1] - self._arrivals[0])
        return max(math.ceil(rate * _TARGET_S), 1)
