"""The compiled library and its C interface, as ctypes sees it (csrc/shoal_cpu.h).

Knows the structs and where the file lies; nothing of tensors.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

_ABI = 5

REDUCE_FAILED = -2
"""What `forward` returns where a function of the model failed."""

_NO_BUILD = (
    "the compiled CPU kernels are not built (they are for x86-64 and need a compiler when shoal "
    "is installed); "
    "install g++ and run `pip install --force-reinstall --no-deps --no-cache-dir shoal`, or "
    "`make clean setup` in a clone"
)


class Weight(Structure):
    """shoal_weight."""

    _fields_ = (
        ("data", c_void_p),
        ("format", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("reserved", c_int32),
    )


class Share(Structure):
    """shoal_share."""

    _fields_ = tuple((name, c_int32) for name in ("expert", "start", "stop"))


class Experts(Structure):
    """shoal_experts."""

    _fields_ = (
        *((name, c_void_p) for name in ("router", "shared_gate")),
        ("weights", POINTER(Weight)),
        ("shares", POINTER(Share)),
        ("counts", c_void_p),
        ("num_shares", c_int32),
        ("layer", c_int32),
        ("bring", c_void_p),
        ("bring_context", c_void_p),
    )


BRING = ctypes.CFUNCTYPE(c_int32, c_void_p, POINTER(Experts), c_int32, c_void_p)
"""shoal_bring: experts come into memory; the first that has not, or -1: it failed."""


class Layer(Structure):
    """shoal_layer."""

    _fields_ = (
        *((name, Weight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")),
        *((name, c_void_p) for name in ("attention_norm", "qk_norm", "post_attention_norm")),
        *((name, c_void_p) for name in ("ffn_norm", "post_ffn_norm")),
        *((name, c_int32) for name in ("window", "rope", "o_lead", "reserved")),
        ("experts", POINTER(Experts)),
    )


REDUCE = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_int64)
"""shoal_reduce: sums floats over the ranks; not 0: it failed."""

ROUTED = ctypes.CFUNCTYPE(
    c_int32, c_void_p, c_int32, c_int32, c_int64, c_void_p, c_void_p, c_void_p
)
"""shoal_routed: before the products of experts; not 0: it failed."""

RETURNED = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32, c_void_p)
"""shoal_returned: after them; not 0: it failed."""


class Model(Structure):
    """shoal_model."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int32) for name in ("ffn", "activation", "num_layers", "num_ropes")),
        *((name, c_float) for name in ("norm_eps", "attention_scale", "attention_softcap")),
        *((name, c_int32) for name in ("kv_format", "group_size", "head_offset")),
        *((name, c_int32) for name in ("attention_width", "num_ranks", "rank", "all_heads")),
        *((name, c_int32) for name in ("all_kv_heads", "first_head", "first_kv_head")),
        *((name, c_int32) for name in ("norm_heads", "norm_kv_heads", "num_experts")),
        *((name, c_int32) for name in ("num_active", "num_expert_groups", "num_active_groups")),
        *((name, c_int32) for name in ("renormalises", "expert_ffn")),
        ("expert_scale", c_float),
        ("layers", POINTER(Layer)),
        *((name, c_void_p) for name in ("inv_freqs", "rope_factors", "final_norm")),
        *((name, c_void_p) for name in ("reduce", "reduce_context")),
        *((name, c_void_p) for name in ("routed", "returned", "experts_context")),
    )


class LayerKV(Structure):
    """shoal_layer_kv."""

    _fields_ = tuple((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


class Batch(Structure):
    """shoal_batch."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        *((name, c_void_p) for name in ("query_lens", "context_lens", "block_tables")),
        ("held_before", c_void_p),
    )


class Ends(Structure):
    """shoal_ends."""

    _fields_ = (
        ("embedding", POINTER(Weight)),
        ("token_ids", c_void_p),
        ("first_id", c_int64),
        ("embedding_scale", c_float),
        ("num_samples", c_int32),
        ("head", POINTER(Weight)),
        *((name, c_void_p) for name in ("samples", "logits", "best")),
    )


_FUNCTIONS = {
    "abi": (c_int32, ()),
    "best_isa": (c_char_p, ()),
    "create": (c_void_p, (c_int32, c_char_p)),
    "destroy": (None, (c_void_p,)),
    "forward": (
        c_int32,
        (c_void_p, POINTER(Model), POINTER(LayerKV), POINTER(Batch), POINTER(Ends), c_void_p),
    ),
    "experts": (
        c_int32,
        (
            *(c_void_p, POINTER(Model), POINTER(Experts), c_int32),
            *(c_void_p, c_void_p, c_void_p, c_void_p),
        ),
    ),
    "linear": (c_int32, (c_void_p, POINTER(Weight), c_void_p, c_int32, c_void_p)),
    "add_gumbel": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "packed_bytes": (c_int64, (c_int32, c_int64, c_int64)),
    "pack": (
        c_int32,
        (
            *(c_void_p, c_int32, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_int64),
            *(c_void_p, c_int64),
        ),
    ),
    "read": (c_uint64, (c_void_p, c_void_p, c_int64)),
}


def load_library() -> ctypes.CDLL:
    """The library, its functions typed. Every call lets go of the GIL.

    Raises:
        OSError: it was not built, or does not load here; the message says what to do.
    """
    path = Path(__file__).parent / f"_library{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file():
        raise OSError(_NO_BUILD)
    library = ctypes.CDLL(os.fspath(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, f"shoal_cpu_{name}")
        except AttributeError as error:
            raise OSError(f"{path} is of another version of shoal: rebuild it") from error
        function.restype, function.argtypes = result, arguments
    if library.shoal_cpu_abi() != _ABI:
        raise OSError(f"{path} is of another version of shoal: rebuild it")
    return library
