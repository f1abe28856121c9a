"""Why a stream had to wait, by what its router recorded (`shoal serve --record`).

Knows nothing of how it came about.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def longest_gap(path: Path, struck: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """The longest gap between tokens of a request, and what was decided around it.

    Args:
        struck: when something was done to replicas, on the router's clock, and what.
    """
    told_s: dict[str, list[float]] = defaultdict(list)
    sent: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
    seen: list[tuple[float, str]] = []
    for now, (event, fields), effects in _lines(path):
        if event in ("ReplicaStuck", "ReplicaLost", "ReplicaReady"):
            stuck = "" if event != "ReplicaStuck" else f" {fields.get('is_stuck')}"
            seen.append((now, f"{event}{stuck} {fields['replica']}"))
        for effect, what in effects:
            if effect == "Deliver":
                for output in what["outputs"]:
                    if output.get("token_ids"):
                        told_s[output["request_id"]].append(now)
            elif effect == "Send":
                request = what["request"]
                known = len(request.get("prompt_ids", ())) + len(request.get("output_ids", ()))
                own_id = request["request_id"].split("~")[0]
                sent[own_id].append((now, what["replica"], known))
    gaps = (
        (after - before, before, request_id)
        for request_id, times in told_s.items()
        for before, after in pairwise(times)
    )
    gap_s, since_s, request_id = max(gaps, default=(0.0, 0.0, ""))
    until_s = since_s + gap_s
    return {
        "gap_s": round(gap_s, 3),
        "sent": [
            f"{at_s - since_s:+.2f} s to {replica}, {known} tokens"
            for at_s, replica, known in sent[request_id]
        ],
        "seen": [
            f"{at_s - since_s:+.2f} s {what}"
            for at_s, what in sorted([*seen, *struck])
            if since_s - 20 <= at_s <= until_s
        ],
    }


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            read = json.loads(line)
            if isinstance(read, list):
                yield read
