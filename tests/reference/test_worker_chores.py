"""What a worker does between two Steps, without a model."""

from __future__ import annotations

import threading
from typing import Any

from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, Split
from shoal.worker.place import Place
from shoal.worker.stage import Chore, StageRunner

ONE_RANK = Split(heads=(Range(0, 4),), ffn=(Range(0, 32),), vocab=(Range(0, 8),))


def test_a_chore_that_fails_does_not_end_the_worker() -> None:
    """A block of KV that does not get onto a full device, say: whoever waits for it gives up."""
    instance = InstancePlan(layers=Range(0, 4), ranks=(RankPlan(),), split=ONE_RANK)
    stages = (StagePlan(instances=(instance,)),)
    place = Place(ReplicaPlan(stages=stages, routes=default_routes(stages)), 0, 0)
    nobody: Any = None
    runner = StageRunner(nobody, place, nobody, nobody)
    did = threading.Event()

    def fail() -> None:
        raise RuntimeError("out of memory")

    thread = threading.Thread(target=runner.run)
    thread.start()
    runner.post(Chore(fail))
    runner.post(Chore(did.set))
    assert did.wait(60), "the worker's thread is gone"
    runner.stop()
    thread.join(60)
    assert not thread.is_alive()
