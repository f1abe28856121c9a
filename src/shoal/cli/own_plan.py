"""The plan that `shoal serve` makes for itself: told none, where several devices are known.

From a cluster file, or from what `shoal probe` has kept of this machine or cluster. Without either,
or with a single device, there is none: what runs then is as it always was.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from shoal.core.cluster import Precision
from shoal.core.errors import ConfigError
from shoal.core.options import EngineOptions, Quantization
from shoal.core.plan import Plan, ReplicaPlan
from shoal.core.whole_file import write_whole
from shoal.plan_file import PlanFile, dump_plan, read_plan


def own_plan(model: Path, options: EngineOptions, cluster_file: Path | None) -> PlanFile | None:
    """The plan, said in a line and written down where that says; None: there is nothing to plan.

    Args:
        cluster_file: as the user named it; None: what was probed.

    Raises:
        ConfigError: the file is wrong, or the model fits none of its devices.
    """
    path = cluster_file or probed_cluster()
    if path is None:
        return None
    try:
        return _planned(model, options, path)
    except ConfigError as error:
        if cluster_file is not None:
            raise
        print(f"plan       none made from {path}: {error}", file=sys.stderr)
        return None


def _planned(model: Path, options: EngineOptions, path: Path) -> PlanFile | None:
    from shoal.cluster.cluster_file import read_cluster
    from shoal.model.cache import models_folder
    from shoal.model.spec import read_spec
    from shoal.planner.goal import Goal
    from shoal.planner.profiles import Problem
    from shoal.planner.search import find_plan
    from shoal.planner.to_plan import to_plan

    cluster = read_cluster(path)
    if len(cluster.devices) < 2:
        return None
    goal = Goal(
        precisions=(precision_of(options),),
        max_tokens=options.max_model_len or 0,
        max_concurrency=options.max_num_seqs,
    )
    found = find_plan(Problem(read_spec(model), cluster, goal, "shoal"))
    made = to_plan(found.choices, cluster, None)
    text = dump_plan(Plan(replicas=tuple(map(_as_served, made.replicas))))
    written = _kept(text, models_folder().parent / "plans")
    used = sum(len(each.ranks) for replica in made.replicas for each in replica.instances)
    print(
        f"plan       made for {used} of the {len(cluster.devices)} devices in {path}: {written} "
        f"(why: shoal plan MODEL --cluster {path} --explain; another: --plan; one device: "
        "--device)",
        file=sys.stderr,
    )
    return read_plan(written)


def _kept(text: str, folder: Path) -> Path:
    """By its content: other servers that start now write the same."""
    written = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(written, text)
    except OSError as error:
        raise ConfigError(
            f"the plan can't be kept in {folder}: {error.strerror}; set SHOAL_CACHE to a folder "
            "that can be written, or name a plan (--plan)"
        ) from error
    return written


def probed_cluster() -> Path | None:
    """What was probed of this machine, or of the cluster whose head it is."""
    from shoal.cli.probe_sites import here_or_cluster, probe_cache
    from shoal.cli.serving import cluster_here

    cluster = cluster_here()
    if probe_cache().is_empty or (cluster is not None and not cluster.is_head):
        return None
    place = here_or_cluster()
    try:
        return probe_cache().path(place.key)
    finally:
        place.launcher().close()


def precision_of(options: EngineOptions) -> Precision:
    wanted = options.quantize
    is_one = wanted in get_args(Quantization) and wanted not in ("auto", "none")
    return cast(Precision, wanted if is_one else "bfloat16")


def _as_served(replica: ReplicaPlan) -> ReplicaPlan:
    """Without precisions: they are the checkpoint's, or as the command's flags say."""
    return replace(
        replica,
        stages=tuple(
            replace(
                stage,
                instances=tuple(
                    replace(each, quantize=None, dtype=None) for each in stage.instances
                ),
            )
            for stage in replica.stages
        ),
    )
