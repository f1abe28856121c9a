"""A group whose sums of hidden states cross the network in int8, where that was chosen.

    one step     everyone gathers everyone's codes and adds them up in rank order
    two steps    each rank adds up its rows of all ranks' codes, codes the sum, and all gather it;
                 three ranks and more, above 64 KiB: fewer bytes, twice as long a way

Sums are fp32, and every rank has the same bits, as of any group. With M_r the largest (of the rest
of a block, see comm/codec.py) of what rank r gives, and M of the sum, a sum is wrong by at most
(M_0 + M_1 + ...) / 253, and in two steps by M / 253 more. Everything else stays exact: other
shapes, `all_gather`, `all_to_all`. Knows nothing of how the form is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.comm.codec import decode, encode, encoded_bytes
from shoal.core.link_forms import FormSteps, form_of

_ONE_STEP_BYTES = 64 << 10


@dataclass(slots=True)
class SumForm:
    """What was chosen; the same on every rank before their next sum."""

    steps: FormSteps = ()


class CompressedGroup:
    """
    Args:
        inner: moves the bytes.
        form: looked at before each sum.
        width: of hidden states; what is not a number of such rows is summed exactly.
    """

    native = None

    def __init__(self, inner: Group, form: SumForm, width: int) -> None:
        self._inner, self._form, self._width = inner, form, width
        self.rank, self.size = inner.rank, inner.size
        self.all_gather, self.all_to_all = inner.all_gather, inner.all_to_all
        self.abort, self.reset, self.close = inner.abort, inner.reset, inner.close

    def all_reduce(self, tensor: Tensor) -> None:
        num_rows, rest = divmod(tensor.numel(), self._width)
        if rest or self.size == 1 or form_of(self._form.steps, num_rows) != "int8":
            self._inner.all_reduce(tensor)
            return
        rows_TE = tensor.view(num_rows, self._width)
        size = encoded_bytes(num_rows, self._width, "int8", tensor.dtype)
        if self.size > 2 and size > _ONE_STEP_BYTES:
            self._in_two_steps(rows_TE)
        else:
            rows_TE.copy_(self._added(self._inner.all_gather(encode(rows_TE, "int8")), num_rows))

    def finish(self) -> None:
        """Wait for what was only queued, where the inner group queues."""
        finish = getattr(self._inner, "finish", None)
        if finish is not None:
            finish()

    def _in_two_steps(self, rows_TE: Tensor) -> None:
        parts = torch.tensor_split(rows_TE, self.size)
        came = self._inner.all_to_all([encode(part, "int8") for part in parts])
        summed_TE = self._added(came, len(parts[self.rank]))
        codes = self._inner.all_to_all([encode(summed_TE, "int8")] * self.size)
        for part, data in zip(parts, codes, strict=True):
            part.copy_(self._decoded(data, len(part)))

    def _added(self, codes: Sequence[Tensor] | Tensor, num_rows: int) -> Tensor:
        """fp32, in rank order."""
        total_TE = self._decoded(codes[0], num_rows)
        for data in codes[1:]:
            total_TE += self._decoded(data, num_rows)
        return total_TE

    def _decoded(self, data: Tensor, num_rows: int) -> Tensor:
        return decode(data, "int8", num_rows, self._width, torch.float32)
