"""How the ranks of an instance reduce, as whoever starts them must know it. Loads no torch."""

from __future__ import annotations

from shoal.comm.memory import create_memory, is_available
from shoal.core.plan import RankPlan


def group_kind(ranks: tuple[RankPlan, ...]) -> str:
    """ "none" (there is one rank), or a module of `comm/`."""
    if len(ranks) == 1:
        return "none"
    if all(rank.device.startswith("cuda") for rank in ranks):
        return "nccl"
    is_one_host = len({rank.host for rank in ranks}) == 1
    is_cpu = all(rank.device == "cpu" for rank in ranks)
    return "shared_memory" if is_one_host and is_cpu and is_available() else "gloo"


def group_memory(kind: str, size: int) -> int | None:
    """A descriptor for the ranks to inherit, which the caller closes; None: they need none.

    There is room for two groups: of all ranks, and of those that keep hidden states.
    """
    return create_memory(size, size) if kind == "shared_memory" else None
