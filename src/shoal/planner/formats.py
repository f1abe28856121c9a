"""How weights of a precision are kept on devices, by what these have kernels for.

Knows nothing of sizes or times.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.cluster import Device, Precision
from shoal.policy.cost_model.numbers import Numbers, computed_in


def numbers_for(devices: Sequence[Device], precision: Precision, kv: Precision) -> Numbers | None:
    """How weights of a precision are kept on devices; None: one of them has no kernels for it.

    Where devices lack the one format of 16 bits they take the other, and without both, float32.
    """
    common = set(devices[0].precisions).intersection(*(each.precisions for each in devices))
    floats: Precision | None = next(
        (each for each in ("bfloat16", "float16", "float32") if each in common), None
    )
    if precision == "float16" and "float16" in common:
        floats = "float16"
    if precision == "float32" and "float32" in common:
        floats = "float32"
    match floats:
        case "bfloat16" | "float16" | "float32" as activations:
            packed = all(each.device == "cpu" for each in devices)
        case _:
            return None
    if precision in ("bfloat16", "float16", "float32"):
        kept: Precision = activations
    elif precision in common:
        kept = precision
    else:
        return None
    return Numbers(
        weights=kept,
        activations=activations,
        kv=kv if kv == "int8" or kv == "fp8" else activations,
        compute=computed_in(kept, packed=packed),
        packed=packed,
    )
