"""Steps of a model's shape that a probe runs, and the cost model's constants that they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

from shoal.core.cluster import Cluster, Constants, Precision
from shoal.core.errors import ConfigError
from shoal.core.options import DType, EngineOptions, Quantization
from shoal.wire.probe_messages import Calibrate, Calibrated

if TYPE_CHECKING:
    from shoal.core.cluster import Device
    from shoal.probe.survey import Survey

_BUDGET_S, _TIMES = 2.0, 2
"""A machine that is slow for a while is so to the model's width and to half of it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Of a model as `shoal plan` takes it, in precisions of weights with commas between them."""

    model: str
    precisions: str

    def questions(self) -> tuple[Calibrate, ...]:
        """
        Raises:
            ConfigError, ModelError: no such precision or model.
        """
        from shoal.cli.model_shape import spec_of
        from shoal.policy.cost_model.calibration import narrow

        spec = spec_of(self.model)
        return tuple(
            Calibrate(width, _options(each), _BUDGET_S)
            for each in self._named()
            for width in (*dict.fromkeys((spec, narrow(spec))),) * _TIMES
        )

    def constants(self, cluster: Cluster, survey: Survey) -> tuple[Constants, ...]:
        """Of every device and precision that was run."""
        found: list[Constants] = []
        for device in cluster.devices:
            runs: dict[Precision, list[Calibrated]] = {}
            for answer in survey.calibrated.get(device.name, ()):
                runs.setdefault(_precision(answer.options), []).append(answer)
            for precision, answers in runs.items():
                found += self._constants(device, precision, answers)
        return tuple(found)

    def _constants(
        self, device: Device, precision: Precision, answers: Sequence[Calibrated]
    ) -> Iterator[Constants]:
        from shoal.planner.formats import numbers_for
        from shoal.policy.cost_model.calibration import device_constants

        numbers = numbers_for([device], precision, "bfloat16")
        if numbers is not None:
            source = f"shoal probe --model {self.model}"
            runs = [(answer.spec, answer.taken) for answer in answers]
            yield device_constants(device, numbers, runs, source=source)

    def _named(self) -> list[Precision]:
        names = [each.strip() for each in self.precisions.split(",")]
        for name in names:
            if name not in (*get_args(Quantization), *get_args(DType)) or name in ("auto", "none"):
                raise ConfigError(
                    f"--precision names {name!r}; it must be of bfloat16, float32, int8, int4, fp8"
                )
        return cast(list[Precision], names)


def _options(precision: Precision) -> EngineOptions:
    if precision in get_args(DType):
        return EngineOptions(model_path="", dtype=cast(DType, precision), quantize="none")
    return EngineOptions(model_path="", quantize=cast(Quantization, precision))


def _precision(options: EngineOptions) -> Precision:
    name = options.dtype if options.quantize == "none" else options.quantize
    return cast(Precision, name)
