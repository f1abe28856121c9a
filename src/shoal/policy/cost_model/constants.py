"""What a roofline leaves out on a device: its own constants, or the nearest kind's, which is named.

    own         engine and precision that were fitted on the device itself, or on its kind
    of a kind   another precision of it, then another engine on it
    derived     its rates were measured by a probe: what a kernel reaches of them, and launches
    nearest     the kind whose bandwidth and flops are nearest
    typical     nothing was fitted at all

Each step down is less sure, which `Constants.error` says. Knows nothing of fitting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from shoal.core.cluster import Cluster, Constants, Device, Precision

LAUNCHES_PER_LAYER = 10
"""Kernels that a layer starts in plain engines: norms, products, rope, attention, activation."""

_OTHER_PRECISION_ERROR, _DERIVED_ERROR, _OTHER_KIND_ERROR = 0.15, 0.2, 0.25

_DERIVED_ETA, _DERIVED_MFU = 0.9, 0.8
"""Kernels reach nine tenths of a read that only reads, and less of a large product."""
_DERIVED_EXPOSED = 0.75
"""Reading and multiplying all but add up on a CPU: 0.63 in bfloat16, 0.92 in int8 (one thread)."""

TYPICAL = Constants(
    kind="a GPU",
    engine="any",
    precision="bfloat16",
    eta=0.8,
    layer_s=50e-6,
    mfu=0.45,
    error=0.4,
    bandwidth_bytes_per_s=2e12,
    flops_per_s=300e12,
    source="the middle of what engines of 2025 reach",
)


def constants_for(cluster: Cluster, device: Device, engine: str, precision: Precision) -> Constants:
    """The best there are; `source` names where they come from."""
    own = [each for each in cluster.constants if each.device == device.name]
    known = own or [each for each in cluster.constants if not each.device]
    for each in known:
        if (each.kind, each.engine, each.precision) == (device.kind, engine, precision):
            return each
    same_kind = [each for each in known if each.kind == device.kind]
    if same_kind:
        found = min(same_kind, key=lambda each: (each.engine != engine, each.precision))
        return _lent(found, device, engine, precision, _OTHER_PRECISION_ERROR)
    if device.source == "measured":
        return Constants(
            kind=device.kind,
            engine=engine,
            precision=precision,
            eta=_DERIVED_ETA,
            layer_s=LAUNCHES_PER_LAYER * device.launch_s,
            mfu=_DERIVED_MFU,
            error=_DERIVED_ERROR,
            bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
            flops_per_s=device.flops_per_s("bfloat16"),
            source=f"derived from what was measured on {device.name}",
            exposed=_DERIVED_EXPOSED if device.kind == "cpu" else 0.0,
        )
    others = _nearest(device, known)
    if others:
        found = min(others, key=lambda each: (each.engine != engine, each.precision != precision))
        return _lent(found, device, engine, precision, _OTHER_KIND_ERROR)
    return TYPICAL


def _lent(
    found: Constants, device: Device, engine: str, precision: Precision, least_error: float
) -> Constants:
    source = (
        f"{found.kind}, {found.engine}, {found.precision}; nothing was fitted on {device.kind}, "
        f"{engine}, {precision}"
    )
    return replace(found, error=max(found.error, least_error), source=source)


def _nearest(device: Device, known: Sequence[Constants]) -> list[Constants]:
    """Those of the kind that is most like the device."""
    if not known:
        return []
    own = (device.bandwidth_bytes_per_s, device.flops_per_s("bfloat16"))
    distances = {
        each.kind: _distance(own, (each.bandwidth_bytes_per_s, each.flops_per_s)) for each in known
    }
    nearest = min(sorted(distances), key=lambda kind: distances[kind])
    return [each for each in known if each.kind == nearest]


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return sum(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))
