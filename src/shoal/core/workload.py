"""Workload: when requests arrive and how long they are; from a trace, or Poisson.

    Azure LLM inference  CSV    TIMESTAMP,ContextTokens,GeneratedTokens
    ServeGen             CSV    timestamp_s,input_tokens,output_tokens,...
    Mooncake             JSONL  timestamp (ms), input_length, output_length, hash_ids
    shoal                JSONL  arrival_s, prompt_tokens (and hash_ids), output_tokens, or prompt
                                as text

The format is told by the header or the first line's keys. The first arrival is at 0 s.
Knows nothing of prompts' contents, servers or clocks; chance comes as an argument.
"""

from __future__ import annotations

import calendar
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from shoal.core.errors import ConfigError

HASH_BLOCK_TOKENS = 512
"""Prompt tokens that one of an arrival's `block_hashes` stands for (Mooncake's)."""

_TICK_S, _TICK_SLACK_S = 3.0, 0.01
"""Of Mooncake's published traces of real traffic; its synthetic one tells milliseconds."""
_MOST_S, _MOST_TOKENS = 1e12, 2**31 - 1
"""Times since 1970 in seconds are below."""
_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a workload.

    Attributes:
        arrival_s: seconds since the workload's start.
        prompt_tokens: its prompt's length; 0 only where `prompt` gives the text instead.
        output_tokens: tokens it generates.
        prompt: its text, if the trace has it.
        block_hashes: names of its prompt's successive blocks of `HASH_BLOCK_TOKENS`; prompts
            that begin with the same names begin with the same tokens.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None
    block_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in the order of time; `name` is for people."""

    name: str
    arrivals: tuple[Arrival, ...]

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival."""
        return self.arrivals[-1].arrival_s if self.arrivals else 0.0

    def stretched(self, factor: float) -> Workload:
        """Arrival times multiplied: 0.5 is twice the load."""
        if not 0 < factor < float("inf"):
            raise ConfigError(f"time scale is {factor}; it must be above 0 (0.5: twice the load)")
        return self._map(lambda a: replace(a, arrival_s=a.arrival_s * factor))

    def clipped(self, *, max_prompt_tokens: int, max_output_tokens: int) -> Workload:
        """Longer prompts and outputs cut to these lengths (prompts given as text stay)."""
        return self._map(
            lambda a: replace(
                a,
                prompt_tokens=min(a.prompt_tokens, max_prompt_tokens),
                output_tokens=min(a.output_tokens, max_output_tokens),
            )
        )

    def first(self, num_requests: int) -> Workload:
        """The earliest `num_requests` of it."""
        return Workload(self.name, self.arrivals[:num_requests])

    def _map(self, change: Callable[[Arrival], Arrival]) -> Workload:
        return Workload(self.name, tuple(change(arrival) for arrival in self.arrivals))


def poisson_workload(
    *, rate_per_s: float, num_requests: int, lengths: Sequence[tuple[int, int]], rng: Random
) -> Workload:
    """Independent arrivals at a mean rate; each draws its (prompt, output) tokens."""
    if not 0 < rate_per_s < float("inf"):
        raise ConfigError(f"rate is {rate_per_s} requests/s; it must be above 0")
    arrivals, now_s = [], 0.0
    for _ in range(num_requests):
        prompt_tokens, output_tokens = rng.choice(lengths)
        arrivals.append(
            Arrival(arrival_s=now_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        )
        now_s += rng.expovariate(rate_per_s)
    return Workload(f"poisson {rate_per_s:g}/s", tuple(arrivals))


def read_workload(path: Path, rng: Random) -> Workload:
    """Read a trace of any format above.

    Raises:
        ConfigError: no such file, a format that none of these is, or a malformed row; it
            names the file and the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return parse_workload(path.name, lines, rng)
    except OSError as error:
        raise ConfigError(
            f"cannot read workload {path}: {error.strerror}; give a trace file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text; give a CSV or JSONL trace") from error


def parse_workload(name: str, lines: Iterable[str], rng: Random) -> Workload:
    """The same from lines; `name` stands for the file in messages."""
    rest = iter(lines)
    first = next((line for line in rest if line.strip()), "").lstrip("\ufeff")
    is_json = first.lstrip().startswith(("{", "["))
    rows = _json_rows(name, first, rest) if is_json else _csv_rows(name, first, rest)
    arrivals: list[Arrival] = []
    read: Callable[[Mapping[str, Any]], Arrival] | None = None
    for line, row in rows:
        read = read or _reader_of(name, row)
        try:
            arrivals.append(_checked(read(row)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)[:_SHOWN]
            raise ConfigError(f"{name}, line {line}: {what}; mend or remove the row") from error
    if not arrivals:
        raise ConfigError(f"{name} holds no arrivals; give a trace with at least one row")
    if read is _mooncake and _is_in_ticks([each.arrival_s for each in arrivals]):
        # Unspread, each tick would be one burst.
        arrivals = [
            replace(each, arrival_s=each.arrival_s + rng.uniform(0, _TICK_S)) for each in arrivals
        ]
    arrivals.sort(key=lambda arrival: arrival.arrival_s)
    start_s = arrivals[0].arrival_s
    shifted = (replace(arrival, arrival_s=arrival.arrival_s - start_s) for arrival in arrivals)
    return Workload(name, tuple(shifted))


def _csv_rows(name: str, header: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        fields = next(csv.reader([header], skipinitialspace=True), [])
    except csv.Error as error:
        raise ConfigError(f"{name}: its header is no CSV ({error}); give a trace") from error
    reader = csv.DictReader(lines, fieldnames=[field.strip() for field in fields])
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(
                f"{name}, line {reader.line_num + 1}: {error}; a quote before it may have no "
                "second one: mend or remove the row"
            ) from error
        # A short row has None values, a long one a None key.
        if None in row or None in row.values():
            raise ConfigError(
                f"{name}, line {reader.line_num + 1}: not the {len(reader.fieldnames or ())} "
                f"fields of the header; mend or remove the row"
            )
        yield reader.line_num + 1, row


def _json_rows(
    name: str, first: str, lines: Iterator[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    line, text = 1, first
    while True:
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{name}, line {line}: not JSON ({error}); mend or remove the row"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(f"{name}, line {line}: not a JSON object; mend or remove the row")
            yield line, row
        try:
            line, text = line + 1, next(lines)
        except StopIteration:
            return


def _reader_of(name: str, row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Arrival]:
    readers = (
        ({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, _azure),
        ({"timestamp_s", "input_tokens", "output_tokens"}, _servegen),
        ({"timestamp", "input_length", "output_length"}, _mooncake),
        ({"arrival_s", "output_tokens"}, _own),
    )
    for needed, reader in readers:
        if needed <= row.keys():
            return reader
    known = "; ".join(",".join(sorted(needed)) for needed, _ in readers)
    raise ConfigError(
        f"{name} has the fields {','.join(row)}; a trace has those of one of: {known}"
    )


def _azure(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        arrival_s=_timestamp_s(row["TIMESTAMP"]),
        prompt_tokens=_count(row["ContextTokens"]),
        output_tokens=_count(row["GeneratedTokens"]),
    )


def _servegen(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        arrival_s=float(row["timestamp_s"]),
        prompt_tokens=_count(row["input_tokens"]),
        output_tokens=_count(row["output_tokens"]),
    )


def _mooncake(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        arrival_s=float(row["timestamp"]) / 1000,
        prompt_tokens=_count(row["input_length"]),
        output_tokens=_count(row["output_length"]),
        block_hashes=_hashes(row),
    )


def _own(row: Mapping[str, Any]) -> Arrival:
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}; it must be text")
    known = row["prompt_tokens"] if prompt is None else row.get("prompt_tokens") or 0
    return Arrival(
        arrival_s=float(row["arrival_s"]),
        prompt_tokens=_count(known),
        output_tokens=_count(row["output_tokens"]),
        prompt=prompt,
        block_hashes=_hashes(row),
    )


def _count(value: Any) -> int:
    """Tokens; tables that once had a gap write 12 as 12.0."""
    if isinstance(value, int) or (isinstance(value, str) and "." not in value):
        return int(value)
    number = float(value)
    if number != int(number):
        raise ValueError(f"{value} tokens; it must be a whole number")
    return int(number)


def _hashes(row: Mapping[str, Any]) -> tuple[int, ...]:
    names = row.get("hash_ids") or ()
    if not isinstance(names, list | tuple):
        raise ValueError(f"hash_ids is {names!r}; it must be a list of numbers")
    return tuple(int(name) for name in names)


def _is_in_ticks(times: Sequence[float]) -> bool:
    """Whether requests share times that lie whole ticks apart."""
    known = sorted(set(times))
    gaps = [(later - time) % _TICK_S for time, later in pairwise(known)]
    in_ticks = all(min(gap, _TICK_S - gap) < _TICK_SLACK_S for gap in gaps)
    return in_ticks and 1 < len(known) < len(times)


def _checked(arrival: Arrival) -> Arrival:
    if not abs(arrival.arrival_s) < _MOST_S:
        raise ValueError(
            f"arrival is at {arrival.arrival_s} s; it must be a finite time, below {_MOST_S:g} s"
        )
    if arrival.prompt_tokens < (1 if arrival.prompt is None else 0):
        raise ValueError(f"prompt of {arrival.prompt_tokens} tokens; it needs at least 1")
    if arrival.output_tokens < 1:
        raise ValueError(f"output of {arrival.output_tokens} tokens; it needs at least 1")
    for what, length in (("prompt", arrival.prompt_tokens), ("output", arrival.output_tokens)):
        if length > _MOST_TOKENS:
            raise ValueError(f"{what} of more than {_MOST_TOKENS:,} tokens; no model takes that")
    return arrival


_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII
)


def _timestamp_s(text: str) -> float:
    """Seconds since 1970 of Azure's timestamps: seven decimals, with or without an offset."""
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"TIMESTAMP is {text!r}; it must look like 2023-11-16 18:15:46.6805900")
    year, month, day, hour, minute, second = (int(field) for field in match.groups()[:6])
    whole_s = calendar.timegm((year, month, day, hour, minute, second))
    offset = match[8] or "Z"
    offset_s = 0
    if offset != "Z":
        offset_s = (int(offset[1:3]) * 60 + int(offset[4:6])) * (60 if offset[0] == "+" else -60)
    return whole_s - offset_s + float(match[7] or 0)
