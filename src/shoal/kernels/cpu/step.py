"""Runs a range of decoder layers, and what stands around them, in one call of the library.

    T tokens   E hidden size   N tokens that are sampled   V vocabulary (a rank's share of it)

A `Session` owns a team of threads and its buffers: one caller at a time. Knows nothing of
checkpoints or requests.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.batch import KVCache
from shoal.kernels.cpu import library as c
from shoal.kernels.cpu.arena import PackedWeight
from shoal.kernels.cpu.layers import CompiledModel


@dataclass(frozen=True, slots=True, eq=False)
class HostBatch:
    """Rows of different lengths, each the newest tokens of one sequence (as `RaggedBatch`).

    Attributes:
        query_lens: tokens of each row; at least 1.
        context_lens: tokens of each row's sequence once this step has run, the row's included.
        block_tables: of each row, blocks of positions 0, 1, ...; 64-bit integers.
        held_before: empty: all blocks are here. Otherwise the tables have those that are, and this
            is `HeldBlocks.before`.
    """

    query_lens: array[int]
    context_lens: array[int]
    block_tables: Sequence[array[int]]
    held_before: Sequence[array[int]] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """What a call gave; its tensors are the session's, and change with the next call.

    Attributes:
        hidden_TE: fp32, after the final norm if the model's last layer ran and it has one.
        logits_NV: fp32, of the tokens asked for.
        best_N: int64, where each row of the logits is largest, the first of equals; zeros where
            there are no logits.
    """

    hidden_TE: Tensor
    logits_NV: Tensor
    best_N: Tensor


class ReduceError(Exception):
    """A sum over the ranks, or an exchange among them, failed; the pass was given up."""


class Session:
    """A team of threads, and calls that it carries out.

    Args:
        num_threads: of the team, the caller's among them.
        isa: instruction set; None: the best this machine has.

    Raises:
        OSError: the library is missing, or the machine lacks AVX2 (or `isa`).
    """

    def __init__(self, num_threads: int, isa: str | None = None) -> None:
        self.native = c.load_library()
        best = self.native.shoal_cpu_best_isa()
        if best is None:
            raise OSError("this CPU lacks AVX2, FMA or F16C, which the compiled kernels need")
        self.isa = isa or best.decode()
        self._context = self.native.shoal_cpu_create(num_threads, self.isa.encode())
        if not self._context:
            raise OSError(f"no team of {num_threads} threads for {self.isa} on this machine")
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}
        weakref.finalize(self, self.native.shoal_cpu_destroy, self._context)

    def forward(
        self,
        model: CompiledModel,
        inputs: array[int] | Tensor,
        batch: HostBatch,
        kv: KVCache,
        samples: array[int],
        layers: tuple[int, int],
        ends: bool,
    ) -> StepOutput:
        """Run layers [first, last) of a batch; writes the tokens' KV.

        Args:
            inputs: of all rows, one row after another: token ids, or hidden states [T, E].
            kv: of all layers of the model.
            samples: tokens of the batch (indices) whose logits are wanted.
            ends: whether the final norm follows.

        Raises:
            ReduceError: a sum over the ranks, or an exchange among them, failed.
        """
        num_tokens, num_samples = len(inputs), len(samples)
        hidden_TE = self._buffer("hidden", num_tokens, model.hidden_size)
        if isinstance(inputs, Tensor):
            hidden_TE.copy_(inputs)
        logits_NV = self._buffer("logits", num_samples, model.num_ids)
        best = array("q", bytes(8 * num_samples))
        tables, held = _pointers(batch.block_tables), _pointers(batch.held_before)
        rows = c.Batch(
            num_tokens,
            len(tables),
            batch.query_lens.buffer_info()[0],
            batch.context_lens.buffer_info()[0],
            ctypes.addressof(tables),
            ctypes.addressof(held) if batch.held_before else None,
        )
        c_ends = c.Ends(
            model.c_embedding,
            None if isinstance(inputs, Tensor) else inputs.buffer_info()[0],
            model.first_id,
            model.embedding_scale,
            num_samples,
            model.c_head,
            samples.buffer_info()[0],
            logits_NV.data_ptr(),
            best.buffer_info()[0],
        )
        code = self.native.shoal_cpu_forward(
            self._context,
            model.c_model(kv, *layers, ends),
            model.c_kv(kv, layers[0]),
            rows,
            c_ends,
            hidden_TE.data_ptr(),
        )
        if code == c.REDUCE_FAILED:
            raise ReduceError(f"what ranks do together failed in a step of {num_tokens} tokens")
        if code != 0:
            raise MemoryError(f"no memory for a step of {num_tokens} tokens")
        best_N = torch.frombuffer(best, dtype=torch.int64) if best else _NOTHING
        return StepOutput(hidden_TE, logits_NV, best_N)

    def experts(
        self, model: CompiledModel, index: int, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        """What a layer's experts add to tokens whose experts were chosen elsewhere, [N, E].

        All tokens that are there are theirs, whatever their shares. The tensor is the session's.

        Args:
            index: of the layer, among the model's here.
            ids_NK: int64; those not held here are none.
            x_NE, weights_NK: fp32.
        """
        assert all(each.is_contiguous() for each in (x_NE, ids_NK, weights_NK)), "rows in turn"
        out_NE = self._buffer("experts", len(x_NE), model.hidden_size)
        code = self.native.shoal_cpu_experts(
            self._context,
            *model.c_experts(index),
            len(x_NE),
            x_NE.data_ptr(),
            ids_NK.data_ptr(),
            weights_NK.data_ptr(),
            out_NE.data_ptr(),
        )
        if code == c.REDUCE_FAILED:
            raise ReduceError(f"experts of {len(x_NE)} tokens were not brought into memory")
        if code != 0:
            raise MemoryError(f"no memory for the experts of {len(x_NE)} tokens")
        return out_NE

    def linear(self, x_NE: Tensor, weight: PackedWeight) -> Tensor:
        """x @ weight.T in fp32, [N, V]."""
        x_NE = x_NE.contiguous()
        out_NV = torch.empty(len(x_NE), weight.rows)
        code = self.native.shoal_cpu_linear(
            self._context,
            ctypes.byref(weight.as_c()),
            x_NE.data_ptr(),
            len(x_NE),
            out_NV.data_ptr(),
        )
        if code != 0:
            raise MemoryError(f"no memory for a product of {len(x_NE)} tokens")
        return out_NV

    def add_noise(
        self,
        logits_RV: Tensor,
        seeds: Sequence[int],
        positions: Sequence[int],
        first_id: int = 0,
    ) -> None:
        """Adds Gumbel noise to fp32 logits in place (as `model/philox.py` defines it).

        Args:
            first_id: token id of the first column.
        """
        assert logits_RV.is_contiguous()
        keys, places = array("Q", seeds), array("q", positions)
        self.native.shoal_cpu_add_gumbel(
            self._context,
            logits_RV.data_ptr(),
            *logits_RV.shape,
            first_id,
            keys.buffer_info()[0],
            places.buffer_info()[0],
        )

    def read(self, data: Tensor) -> None:
        """Read memory once, with every thread: what a bandwidth is measured with."""
        self.native.shoal_cpu_read(self._context, data.data_ptr(), data.nbytes)

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """Kept between calls: fresh memory would cost a page fault for every 4 KiB.

        Views are kept too: making one lets go of the GIL, and the engine's thread would take it
        just when the next step is ready to go.
        """
        key = name, rows, columns
        if key not in self._views:
            kept = self._buffers.get(name)
            if kept is None or kept.shape[1] != columns or len(kept) < rows:
                self._views.clear()
                kept = self._buffers[name] = torch.empty(rows, columns)
            self._views[key] = kept[:rows]
        return self._views[key]


def _pointers(arrays: Sequence[array[int]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(each.buffer_info()[0] for each in arrays))


_NOTHING = torch.empty(0, dtype=torch.int64)
