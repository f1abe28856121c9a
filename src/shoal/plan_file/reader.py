"""`read_plan`: a plan file in two steps, since the model it is for stands inside.

file = read_plan(Path("plan.yaml"))     what is wrong in itself is said here
plan = file.resolve(spec)               and here, what does not fit the model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import Plan
from shoal.plan_file.drafts import MAX_SEQS, PLAN_KEYS, ReplicaDraft, draft_replicas
from shoal.plan_file.even import require_device
from shoal.plan_file.fields import Field, read_fields
from shoal.plan_file.resolve import resolve_replica


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan file that is well-formed; `model` and `max_num_seqs` as it names them."""

    model: str | None
    drafts: tuple[ReplicaDraft, ...]
    max_num_seqs: int | None = None

    def resolve(self, spec: ModelSpec, *, num_cuda: int | None = None) -> Plan:
        """The Plan for a model.

        Args:
            num_cuda: GPUs of this machine; None: not to be checked.

        Raises:
            ConfigError: with file and line: what fits neither the model nor the machine.
        """
        if num_cuda is not None:
            self._require_devices(num_cuda)
        return Plan(
            replicas=tuple(resolve_replica(draft, spec) for draft in self.drafts),
            model=self.model,
            max_num_seqs=self.max_num_seqs,
        )

    def _require_devices(self, num_cuda: int) -> None:
        for draft in self.drafts:
            for stage in draft.stages:
                for instance in stage.instances:
                    for rank, place in zip(instance.ranks, instance.device_places, strict=True):
                        try:
                            require_device(rank.device, num_cuda)
                        except ConfigError as error:
                            raise place.error(str(error)) from error


def read_plan(path: Path) -> PlanFile:
    """A plan file.

    Raises:
        ConfigError: with file and line.
    """
    root = read_fields(path)
    return plan_of(root.entries(PLAN_KEYS), root)


def plan_of(entries: Mapping[str, Field], root: Field) -> PlanFile:
    """The plan in a file that may hold more than one (a lab's)."""
    model = entries["model"].text() if "model" in entries else None
    most = entries["max_num_seqs"].integer(1, MAX_SEQS) if "max_num_seqs" in entries else None
    return PlanFile(model, draft_replicas(entries, root), most)
