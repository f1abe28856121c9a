"""Splits of small groups against every composition of heads and of columns in sixteenths."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from brute_force_groups import Ways
from random_clusters import random_cluster, random_goal, random_spec

from shoal.planner.formats import numbers_for
from shoal.planner.profiles import Group, Problem
from shoal.policy.cost_model.constants import TYPICAL


@pytest.mark.parametrize("seed", range(8, 20))
def test_splits_are_as_quick_as_any_in_steps_and_prompts(seed: int) -> None:
    """Two or three ranks; for prompts that weigh nothing, as many as there are, and all."""
    rng = Random(seed)
    spec, cluster, goal = random_spec(rng), random_cluster(rng, 2 + seed % 2), random_goal(rng)
    if seed % 3 == 0:  # what is read and what is multiplied add up, or nearly
        kinds = dict.fromkeys(each.kind for each in cluster.devices)
        own = (replace(TYPICAL, kind=kind, engine="shoal", exposed=0.8) for kind in kinds)
        cluster = replace(cluster, constants=tuple(own))
    problem = Problem(spec, cluster, goal)
    group = Group(problem, cluster.devices)
    numbers = numbers_for(group.devices, "bfloat16", goal.kv_precision)
    assert numbers is not None
    ways = Ways(problem, group.devices, "bfloat16", numbers)
    heads = np.array(ways.heads)[:, None]
    all_work = ((heads + ways.columns[None]) > 0).all(-1).reshape(-1)
    compared = 0
    for batch in (1, 4, 8):
        for weight in (0.0, batch / goal.output_tokens, 1e3):
            times = ways.layer_s(batch) + weight * ways.prompt_s
            for layers in (1, spec.num_layers):
                fits = all_work & (ways.room(batch, (False, False)) >= layers)
                if fits.any():
                    own = [
                        each.layer_s(batch) + weight * each.prompt_layer_s
                        for each in group.variants
                        if each.most_layers(batch, False, False) >= layers
                    ]
                    assert min(own) <= times[fits].min() * 1.03
                    compared += 1
    assert compared or not group.variants
