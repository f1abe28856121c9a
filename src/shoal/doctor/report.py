"""Findings for people and for scripts, and the facts of another machine read back.

Knows nothing of terminals or of what is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.core.errors import ConfigError
from shoal.doctor.facts import Machine
from shoal.doctor.finding import Finding, Status

MAX_REPORT_BYTES = 4 << 20
_ORDER: tuple[Status, ...] = ("fail", "warn", "ok", "skipped")


class _Report(msgspec.Struct):
    """What of a report is read back."""

    machine: Machine


def as_json(findings: Sequence[Finding], machine: Machine | None) -> str:
    """`machine`: the facts that `read_report` reads on another machine."""
    report: dict[str, Any] = {
        "status": worst(findings),
        "counts": counts(findings),
        "findings": findings,
    }
    if machine is not None:
        report["machine"] = machine
    text = msgspec.json.encode(report, order="deterministic")
    return msgspec.json.format(text, indent=1).decode()


def read_report(path: Path) -> Machine:
    """The facts in what `shoal doctor --json` printed on another machine.

    Raises:
        ConfigError: it cannot be read, or is no such report.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a readable file") from error
    if len(data) > MAX_REPORT_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_REPORT_BYTES} bytes; give a report's file")
    try:
        return msgspec.json.decode(data, type=_Report).machine
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no report of a machine ({error}); write one there: shoal doctor --json"
        ) from error


def worst(findings: Sequence[Finding]) -> Status:
    found = {finding.status for finding in findings}
    return next((status for status in _ORDER if status in found), "ok")


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    counter = Counter(finding.status for finding in findings)
    return {status: counter[status] for status in _ORDER}


def lines(findings: Sequence[Finding], *, everything: bool) -> Iterator[tuple[Status | None, str]]:
    """Of text, with the status that a line begins with: what to mend in full, the rest in short.

    Args:
        everything: also what is well, and what was skipped.
    """
    shown: tuple[Status, ...] = _ORDER if everything else ("fail", "warn")
    for subject in dict.fromkeys(finding.subject for finding in findings):
        own = [finding for finding in findings if finding.subject == subject]
        yield None, subject
        for status in shown:
            for finding in (each for each in own if each.status == status):
                yield status, f"{finding.check}: {finding.found}"
                if finding.remedy:
                    yield None, f"          why: {finding.why}"
                    yield None, f"          do:  {finding.remedy}"
    found = counts(findings)
    said = ", ".join(f"{number} {status}" for status, number in found.items() if number)
    hidden = "" if everything or not (found["ok"] or found["skipped"]) else " (--all shows them)"
    yield None, f"{said or 'nothing to check'}{hidden}"
