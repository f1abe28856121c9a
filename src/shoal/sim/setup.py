"""A replica to simulate: what its engine is told, and what Steps cost there."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.plan import Role
from shoal.engine.config import EngineConfig
from shoal.sim.cost import StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSetup:
    """`config` is a live engine's; its token ids are the simulation's own."""

    name: str
    config: EngineConfig
    cost: StepCost
    role: Role = "any"
