"""The load that a command's flags ask for: the flags, and the trace or Poisson arrivals of them.

Knows no command.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated

import typer

from shoal.core.errors import ConfigError
from shoal.core.workload import Workload, poisson_workload, read_workload

Trace = Annotated[
    Path | None, typer.Option(help="trace: Azure, ServeGen, Mooncake or shoal's JSONL")
]
Rate = Annotated[
    float | None, typer.Option(help="without a trace: mean Poisson arrivals per second")
]
NumRequests = Annotated[
    int | None, typer.Option(min=1, help="at most this many requests (with --rate: 100)")
]
InputTokens = Annotated[
    int | None, typer.Option(min=1, help="prompt length; of a trace: the longest")
]
OutputTokens = Annotated[
    int | None, typer.Option(min=1, help="output length; of a trace: the longest")
]
TimeScale = Annotated[float, typer.Option(help="multiplies arrival times: 0.5 is twice the load")]
SloBounds = Annotated[str | None, typer.Option(help="goodput's bounds: ttft=2s,tpot=50ms")]

_NO_LIMIT = 2**31 - 1


def chosen_workload(
    path: Path | None,
    rate: float | None,
    *,
    num_requests: int | None,
    input_tokens: int | None,
    output_tokens: int | None,
    rng: Random,
) -> Workload:
    """
    Args:
        path, rate: one of them.
        num_requests: at most; of Poisson arrivals, 100 unless it says so.
        input_tokens, output_tokens: of a trace, the longest there may be.

    Raises:
        ConfigError: neither or both, or a trace that cannot be read.
    """
    if (path is None) == (rate is None):
        raise ConfigError("a load needs one of --workload FILE and --rate R; give exactly one")
    if path is None:
        assert rate is not None
        lengths = [(input_tokens or 512, output_tokens or 128)]
        return poisson_workload(
            rate_per_s=rate, num_requests=num_requests or 100, lengths=lengths, rng=rng
        )
    workload = read_workload(path, rng).clipped(
        max_prompt_tokens=input_tokens or _NO_LIMIT, max_output_tokens=output_tokens or _NO_LIMIT
    )
    return workload if num_requests is None else workload.first(num_requests)
