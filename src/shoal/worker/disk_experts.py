"""What experts on disk cost a decode step of one token, as it is said before the first one.

    in memory    bytes of all that the token needs / (memory bandwidth x 0.8)
    from disk    that, and reading the experts that memory has not: they are waited for

Each expert is taken to be wanted as often as any other; where some are more popular, memory has
more of what is wanted. Bandwidths are measured here. Knows nothing of how experts are read or run.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.kernels.cpu.step import Session
from shoal.model.expert_store import ExpertStore
from shoal.model.packed_decoder import PackedDecoder
from shoal.worker.capacity import size_text
from shoal.worker.disk_layers import StepTimes, bandwidth, predict


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Of a decode step of one token with a short context, predicted.

    Attributes:
        found: part of the experts that a token wants which memory has.
        experts: as it is.
        layers_s: with whole layers on disk instead; None: they would not do.
    """

    found: float
    experts: StepTimes
    layers_s: float | None


def predict_experts(
    *,
    num_bytes: int,
    bandwidth_bytes_per_s: float,
    wanted: float,
    missing: float,
    expert_bytes: float,
    read_s: float,
    instead_bytes: int | None,
) -> ExpertTimes:
    """Step times.

    Args:
        num_bytes: of what every token needs, experts aside.
        wanted, missing: experts of a token, in all layers.
        read_s: of one expert.
        instead_bytes: of whole layers that a step would read instead.
    """
    needed = num_bytes + round(wanted * expert_bytes)
    in_memory = predict(
        num_bytes=needed,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        read_s=0.0,
        read_cpu_s=0.0,
        num_threads=1,
    ).in_memory_s
    layers_s = None
    if instead_bytes is not None:
        layers_s = max(in_memory, instead_bytes / expert_bytes * read_s)
    times = StepTimes(in_memory, in_memory + missing * read_s)
    return ExpertTimes(1 - missing / wanted if wanted else 1.0, times, layers_s)


def disk_experts_text(decoder: PackedDecoder, session: Session) -> str:
    """For people; "": all experts are in memory."""
    store = decoder.store
    if store is None:
        return ""
    times = expected_times(decoder, store, session)
    wanted = sum(each.expected_wanted for each in store.layers)
    instead = ""
    if times.layers_s is not None:
        instead = f" ({times.layers_s * 1e3:.1f} ms with whole layers on disk)"
    slots = sum(len(each.slots) for each in store.layers)
    total = sum(each.num_experts for each in store.layers)
    step_s = times.experts.from_disk_s
    return (
        f"{total} experts, {size_text(store.size_bytes)}, are on disk, {slots} of them in memory "
        f"at a time: of {wanted:.0f} that a token wants, {times.found:.0%} are there if all are "
        f"wanted alike, and {wanted * (1 - times.found):.1f} are read, {store.read_s * 1e3:.1f} "
        f"ms each: a decode step of about {step_s * 1e3:.1f} ms, "
        f"{step_s / times.experts.in_memory_s:.1f} times that in memory{instead}; --quantize int4 "
        "or more memory makes it faster"
    )


def expected_times(decoder: PackedDecoder, store: ExpertStore, session: Session) -> ExpertTimes:
    """As measured here, before the first step."""
    wanted = sum(each.expected_wanted for each in store.layers)
    num_experts = sum(each.num_experts for each in store.layers)
    return predict_experts(
        num_bytes=decoder.weight_bytes - store.slot_bytes,
        bandwidth_bytes_per_s=bandwidth(session, store.in_memory),
        wanted=wanted,
        missing=sum(each.expected_missing for each in store.layers),
        expert_bytes=store.size_bytes / num_experts,
        read_s=store.read_s,
        instead_bytes=store.instead_bytes,
    )
