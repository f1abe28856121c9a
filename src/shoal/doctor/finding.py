"""A check, and what it says: what was found, why it matters, one remedy.

    Check(name, why, judge)      judge(facts) → verdicts; none: nothing to say
    examine(checks, facts)       → findings

Knows nothing of what is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Status = Literal["ok", "warn", "fail", "skipped"]

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check says of one thing; `remedy` is "" where nothing needs one."""

    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Check(Generic[F]):
    """
    Attributes:
        name: for people and scripts: "swap".
        why: it matters.
        judge: verdicts of facts; pure.
    """

    name: str
    why: str
    judge: Callable[[F], Iterable[Verdict]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A verdict with its check; `subject` says of which machine, file or plan."""

    subject: str
    check: str
    status: Status
    found: str
    why: str
    remedy: str


def examine(subject: str, checks: Sequence[Check[F]], facts: F) -> tuple[Finding, ...]:
    """What all checks say, in their order."""
    return tuple(
        Finding(
            subject=subject,
            check=check.name,
            status=verdict.status,
            found=verdict.found,
            why=check.why,
            remedy=verdict.remedy,
        )
        for check in checks
        for verdict in check.judge(facts)
    )


def ok(found: str) -> Verdict:
    return Verdict("ok", found)


def warn(found: str, remedy: str) -> Verdict:
    return Verdict("warn", found, remedy)


def fail(found: str, remedy: str) -> Verdict:
    return Verdict("fail", found, remedy)


def skipped(reason: str) -> Verdict:
    return Verdict("skipped", reason)


def gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def gigabits(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:g} Gbit/s"
