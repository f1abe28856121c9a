"""A replica to simulate: what its engine is told, and what Steps cost there."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.plan import Role
from shoal.core.stats import EngineInfo
from shoal.engine.config import EngineConfig
from shoal.sim.cost import StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSetup:
    """`config` is a live engine's; its token ids are the simulation's own.

    Attributes:
        kv_block_bytes: over all layers; 0: KV stays where it is.
    """

    name: str
    config: EngineConfig
    cost: StepCost
    role: Role = "any"
    kv_block_bytes: int = 0


def info_of(setup: ReplicaSetup) -> EngineInfo:
    """What it tells a router."""
    return setup.config.info(device="simulated", dtype="", kv_block_bytes=setup.kv_block_bytes)
