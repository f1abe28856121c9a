"""Flags of whoever routes requests to replicas, its own engines or other servers.

Knows nothing of what the values do.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _option(flag: str, words: str, **more: Any) -> Any:
    return typer.Option(flag, help=words, rich_help_panel="Router", **more)


Upstream = Annotated[
    list[str] | None,
    _option(
        "--upstream",
        "URL of a server that speaks OpenAI's API, and its devices, if known: "
        "http://a:8000=H100, http://b:8000=L4,L4; may be repeated.",
        metavar="URL[=DEVICES]",
    ),
]
UpstreamKey = Annotated[
    list[str] | None,
    _option(
        "--upstream-key",
        "Where an upstream's API key is, without URL for all: [URL=]env:NAME, or a file; may be "
        "repeated.",
        metavar="[URL=]WHERE",
    ),
]
ModelName = Annotated[
    list[str] | None,
    _option(
        "--model-name",
        "Name in the API, and what upstreams call it; may be repeated.",
        metavar="NAME[=THEIRS]",
    ),
]
RouterPolicy = Annotated[
    str,
    _option(
        "--router-policy",
        "How the replica of a request is chosen: predicted, prefix-aware, power-of-two, "
        "least-outstanding, weighted or round-robin.",
        metavar="NAME",
    ),
]
Collapse = Annotated[
    bool,
    _option(
        "--collapse/--no-collapse",
        "Requests that would give the same tokens share one computation.",
    ),
]
Hedging = Annotated[
    bool,
    _option(
        "--hedging/--no-hedging",
        "Try a request at a second replica when it is late or stalls.",
    ),
]
RouterSlo = Annotated[
    str | None,
    _option("--slo", "What requests are to keep to: ttft=2s,tpot=50ms."),
]
