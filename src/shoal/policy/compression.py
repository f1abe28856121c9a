"""In which form hidden states cross a link: as computed, or in fewer bytes where that is felt.

    time of a message    latency + bytes / bandwidth + time to code it, there and back
    time of a Step       as measured; beyond the tokens it was measured with, in proportion
    what is taken        the most exact form that is slower than the fastest by at most `WORTH` of
                         the Step's time and the message's

A link that is fast against what is computed, and messages too small to be felt, stay exact. Sums
within an instance stand still for each message, and each rounds anew: they must save more.
Knows nothing of sockets; everything measured is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.core.link_forms import FormSteps
from shoal.core.options import ActivationFormat, LinkFormat

WORTH = 0.1
WORTH_OF_SUMS = 0.4

CODING_CALL_S = 1e-4
"""Of coding a message and back, however small: two dozen calls of torch."""

INT8_BYTES = 1.0625
"""Of a number, with scales and the columns that are kept apart (comm/codec.py)."""

LARGEST_STEP_TOKENS = 1 << 14

_SUM_FORMS: tuple[LinkFormat, LinkFormat] = ("exact", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A link, as measured; `latency_s` is one way."""

    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a worker is, as measured.

    Attributes:
        step_s: of a Step of `step_tokens` through its part of the model.
        coding_s: to code one number to int8 and back.
    """

    step_s: float
    step_tokens: int
    coding_s: float

    def step_of(self, num_tokens: int) -> float:
        """A Step of fewer tokens reads the same weights."""
        return self.step_s * max(1.0, num_tokens / self.step_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What crosses: [tokens, width] numbers of `itemsize` bytes."""

    width: int
    itemsize: int

    def seconds(self, num_tokens: int, form: LinkFormat, way: Way, pace: Pace) -> float:
        """From when it is computed to when it is there."""
        numbers = num_tokens * self.width
        size = {"exact": float(self.itemsize), "bfloat16": 2.0, "int8": INT8_BYTES}[form]
        coding_s = 0.0 if form == "exact" else CODING_CALL_S + numbers * pace.coding_s
        return way.latency_s + numbers * size / way.bandwidth_bytes_per_s + coding_s


def choose(wanted: ActivationFormat, message: Message, way: Way, pace: Pace) -> FormSteps:
    """For what a stage sends to the next one.

    Args:
        wanted: by the user; only "auto" is weighed.
    """
    forms: list[LinkFormat] = ["exact", "bfloat16", "int8"]
    if message.itemsize <= 2:
        forms.remove("bfloat16")

    def best(num_tokens: int) -> LinkFormat:
        taken = {form: message.seconds(num_tokens, form, way, pace) for form in forms}
        least_s, step_s = min(taken.values()), pace.step_of(num_tokens)
        return next(f for f in forms if taken[f] - least_s <= WORTH * (step_s + taken[f]))

    return _fixed(wanted, forms) if wanted != "auto" else _steps(best)


def choose_sums(
    wanted: ActivationFormat,
    message: Message,
    way: Way,
    pace: Pace,
    *,
    num_ranks: int,
    num_sums: int,
) -> FormSteps:
    """For the sums of an instance: exact or int8; of each, a rank sends what the others get.

    Args:
        way: between its ranks, for what one rank gives.
        num_sums: in a Step; `pace.step_s` was measured with all of them, exact.
    """
    per_rank = Message(width=message.width * (num_ranks - 1), itemsize=message.itemsize)

    def sums_s(num_tokens: int, form: LinkFormat) -> float:
        return num_sums * per_rank.seconds(num_tokens, form, way, pace)

    compute_s = max(0.0, pace.step_s - sums_s(pace.step_tokens, "exact"))
    computing = replace(pace, step_s=compute_s)

    def best(num_tokens: int) -> LinkFormat:
        exact_s, int8_s = (sums_s(num_tokens, form) for form in _SUM_FORMS)
        step_s = computing.step_of(num_tokens) + exact_s
        return "int8" if exact_s - int8_s > WORTH_OF_SUMS * step_s else "exact"

    return _fixed(wanted, _SUM_FORMS) if wanted != "auto" else _steps(best)


def _fixed(wanted: ActivationFormat, forms: Sequence[LinkFormat]) -> FormSteps:
    """A form that saves nothing here is left out."""
    return tuple((1, form) for form in forms if form == wanted != "exact")


def _steps(best: Callable[[int], LinkFormat]) -> FormSteps:
    """Where the best changes, looked for at powers of two."""
    found: list[tuple[int, LinkFormat]] = []
    num_tokens = 1
    while num_tokens <= LARGEST_STEP_TOKENS:
        form = best(num_tokens)
        if form != (found[-1][1] if found else "exact"):
            found.append((num_tokens, form))
        num_tokens *= 2
    return tuple(found)
