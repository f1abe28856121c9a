"""What a prober and the processes that measure for it say to each other.

    prober → process   LaunchProbe, then Connect and Lab (`worker_messages.py`); after that one
                       question at a time; leaving is closing
    process → prober   Bound, then an answer to each question: what was measured, or Unmeasured

Knows nothing of how anything is measured.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from shoal.core.cluster import Points
from shoal.core.measured import DeviceMeasure
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.step_times import StepTaken
from shoal.wire.curve import MeshKeys


class LaunchProbe(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Which device to measure, and who the others are.

    Attributes:
        device: "cpu" or "cuda:N".
        speed: of a lab's device.
        address: where its sockets are bound.
        keys: its own, and by which it knows the others.
    """

    module: ClassVar[str] = "shoal.probe.process"
    group_fd: ClassVar[int | None] = None

    name: str
    device: str
    num_threads: int
    speed: float
    address: str
    keys: MeshKeys


class MeasureDevice(msgspec.Struct, tag=True, frozen=True):
    """Answered by `DeviceMeasured`, after so long about."""

    seconds: float


class MeasureWay(msgspec.Struct, tag=True, frozen=True):
    """Messages to a peer; answered by `WayMeasured`."""

    peer: str


class MeasureSums(msgspec.Struct, tag=True, frozen=True):
    """All-reduces; every rank is asked. Answered by `SumsMeasured`.

    Attributes:
        number: of the group, among all that this prober makes.
        kind: a module of `comm/`.
    """

    number: int
    kind: str
    rank: int
    size: int


class MeasureDisk(msgspec.Struct, tag=True, frozen=True):
    """Where models are kept; answered by `DiskMeasured`."""


class DescribeMachine(msgspec.Struct, tag=True, frozen=True):
    """Answered by `MachineDescribed`."""


class Calibrate(msgspec.Struct, tag=True, frozen=True):
    """Steps of a model's shape; answered by `Calibrated`.

    Attributes:
        options: with the precision; the device is the process's own.
        budget_s: for all of it, about.
    """

    spec: ModelSpec
    options: EngineOptions
    budget_s: float


class DeviceMeasured(msgspec.Struct, tag=True, frozen=True):
    measure: DeviceMeasure


class WayMeasured(msgspec.Struct, tag=True, frozen=True):
    """Seconds one way, by size."""

    points: Points


class SumsMeasured(msgspec.Struct, tag=True, frozen=True):
    points: Points


class DiskMeasured(msgspec.Struct, tag=True, frozen=True):
    bytes_per_s: float


class MachineDescribed(msgspec.Struct, tag=True, frozen=True):
    """`topology`: JSON of what driver and kernel say (cluster/topology.py)."""

    topology: bytes


class Calibrated(msgspec.Struct, tag=True, frozen=True):
    """Under which options; `spec`: of what ran."""

    spec: ModelSpec
    options: EngineOptions
    taken: tuple[StepTaken, ...]


class Unmeasured(msgspec.Struct, tag=True, frozen=True):
    """It could not be; why, for people."""

    reason: str


Question = MeasureDevice | MeasureWay | MeasureSums | MeasureDisk | DescribeMachine | Calibrate
Answer = (
    DeviceMeasured
    | WayMeasured
    | SumsMeasured
    | DiskMeasured
    | MachineDescribed
    | Calibrated
    | Unmeasured
)
