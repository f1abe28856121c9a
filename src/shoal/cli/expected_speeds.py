"""How fast the replicas of a plan should be, for a router to begin with: by the cost model.

Where devices are known, from a cluster file or from what `shoal probe` kept. Of the others the
router learns it from what they do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from shoal.cli.own_plan import precision_of, probed_cluster
from shoal.core.errors import ConfigError
from shoal.core.options import EngineOptions
from shoal.core.plan import Plan, ReplicaPlan
from shoal.core.speed import Speed

log = logging.getLogger(__name__)


def expected_speeds(
    replicas: Sequence[ReplicaPlan | None], options: EngineOptions, cluster_file: Path | None
) -> dict[str, Speed]:
    """By name of the replica; empty where the cost model knows nothing of their devices."""
    planned = [each for each in replicas if each is not None]
    if len(planned) < 2 or len(planned) < len(replicas):
        return {}
    path = cluster_file or probed_cluster()
    if path is None:
        return {}
    try:
        return _by_cost_model(planned, options, path)
    except ConfigError as error:
        log.info("speeds of replicas are learned; the cost model does not know them: %s", error)
        return {}


def _by_cost_model(
    replicas: Sequence[ReplicaPlan], options: EngineOptions, path: Path
) -> dict[str, Speed]:
    from shoal.cluster.cluster_file import read_cluster
    from shoal.model.spec import read_spec
    from shoal.sim.from_plan import Limits, replica_setups
    from shoal.sim.speeds import speed_of

    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        precision=precision_of(options),
    )
    spec, plan = read_spec(Path(options.model_path)), Plan(replicas=tuple(replicas))
    setups = replica_setups(plan, spec, read_cluster(path), limits)
    return {each.name: speed_of(each) for each in setups}
