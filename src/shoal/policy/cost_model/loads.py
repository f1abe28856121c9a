"""What a Step asks of a stage: tokens, KV that is read, pairs of attention.

    row      start ........ start + n      n queries, which read start + n positions of KV
    pairs    n x start + n (n + 1) / 2     query and key, causally

Loads add up, so that a Step's is the sum of its rows'. Knows nothing of shapes or devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.core.model_spec import ModelSpec

Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class StepLoad:
    """
    Attributes:
        num_tokens: new ones, of all rows.
        num_sampled: rows whose last token's logits are wanted.
        num_ended: of these, rows of more than one token: prompts that end here.
        windows: those of the model's layers (`windows_of`).
        kv_tokens, pairs: for each window, positions of KV that are read, and pairs of a query and
            a key, in one layer.
    """

    num_tokens: int
    num_sampled: int
    windows: Windows
    kv_tokens: tuple[int, ...]
    pairs: tuple[int, ...]
    num_ended: int = 0

    @property
    def num_decoding(self) -> int:
        """Sequences that get a token and had one before."""
        return self.num_sampled - self.num_ended

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, bool]], windows: Windows = (None,)) -> StepLoad:
        """
        Args:
            rows: (position of the first new token, new tokens, whether the row samples).
        """
        tokens = sampled = ended = 0
        every, narrow = 0, [window for window in windows if window is not None]
        read = 0
        reads, pairs = [0] * len(narrow), [0] * len(narrow)
        for start, count, samples in rows:
            tokens += count
            sampled += samples
            ended += samples and count > 1
            read += start + count
            every += count * start + count * (count + 1) // 2
            for index, window in enumerate(narrow):
                reads[index] += min(start + count, window + count - 1)
                pairs[index] += _pairs(start, count, window)
        return cls(
            tokens,
            sampled,
            windows,
            _by_window(windows, read, reads),
            _by_window(windows, every, pairs),
            ended,
        )

    @classmethod
    def decode(cls, batch: int, context: int, windows: Windows = (None,)) -> StepLoad:
        """One token for each of `batch` sequences of `context` tokens, the new one included."""
        return cls.of([(context - 1, 1, True)], windows).times(batch)

    @classmethod
    def prefill(cls, num_tokens: int, start: int = 0, windows: Windows = (None,)) -> StepLoad:
        """A chunk of a prompt, whose last token's logits are wanted."""
        return cls.of([(start, num_tokens, True)], windows)

    def __add__(self, other: StepLoad) -> StepLoad:
        return StepLoad(
            self.num_tokens + other.num_tokens,
            self.num_sampled + other.num_sampled,
            self.windows,
            tuple(a + b for a, b in zip(self.kv_tokens, other.kv_tokens, strict=True)),
            tuple(a + b for a, b in zip(self.pairs, other.pairs, strict=True)),
            self.num_ended + other.num_ended,
        )

    def times(self, count: int) -> StepLoad:
        """That of so many equal rows."""
        return StepLoad(
            self.num_tokens * count,
            self.num_sampled * count,
            self.windows,
            tuple(each * count for each in self.kv_tokens),
            tuple(each * count for each in self.pairs),
            self.num_ended * count,
        )


def windows_of(spec: ModelSpec) -> Windows:
    """The different windows of a model's layers, in order of first use."""
    return tuple(dict.fromkeys(layer.window for layer in spec.layers))


def _by_window(windows: Windows, of_all: int, of_narrow: Iterable[int]) -> tuple[int, ...]:
    """Sums in the order of the windows; None is the one that sees all."""
    narrow = iter(of_narrow)
    return tuple([of_all if window is None else next(narrow) for window in windows])


def _pairs(start: int, count: int, window: int) -> int:
    if start + count <= window:
        return count * start + count * (count + 1) // 2
    growing = max(window - start, 0)  # queries that still see all before them
    return growing * start + growing * (growing + 1) // 2 + (count - growing) * window
