"""Collectives among the ranks of an instance: one interface, a transport for every place.

    in_process      threads of one process: tests, and `LLM` with several ranks
    shared_memory   processes of one host, on CPUs
    gloo            CPUs of several hosts
    nccl            NVIDIA GPUs

Every rank makes the same calls in the same order. Sums are taken in one order, so every rank has
the same bits: what follows from them (which token is best) needs no further word. Knows nothing
of models, Steps or who the ranks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NativeReduce:
    """`all_reduce` of fp32 as a C function, for kernels that call it in the middle of a step.

        int32_t reduce(void* context, float* data, int64_t count)      0, or not: it failed

    Attributes:
        function, context: addresses; they live as long as the group.
    """

    function: int
    context: int


class Group(Protocol):
    """The ranks of an instance; one thread of each rank calls at a time.

    Calls raise `CommError` when a rank did not come within the deadline, or after `abort`.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def native(self) -> NativeReduce | None:
        """None: there is only the Python one."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place; contiguous, floating point, of one shape everywhere."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, [size, *shape]; of one shape and dtype everywhere."""

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Part r goes to rank r; returns what came from each rank, in their order.

        Parts may be of any length, 0 among them: who gets them is told. Their dtype and the rest of
        their shape are the same everywhere, and a row takes at least a byte.
        """

    def abort(self) -> None:
        """Make the call that runs, on any rank, fail; from any thread."""

    def reset(self, incarnation: int) -> None:
        """After a failure: begin anew, as all ranks do. Counts up from 0."""

    def close(self) -> None: ...
