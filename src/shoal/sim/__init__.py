"""Replicas, a router and their load on paper: the engine's and the router's own code, no devices.

    cost.py       what a Step costs on an instance; instance_seconds.py asks the cost model
    from_plan.py  a plan's replicas on a cluster
    pipeline.py   instances: Steps queue, run, go on to the next
    replica.py    an engine and its pipeline; runs of decode Steps taken at once
    prompts.py    a workload's requests as token ids
    faults.py     slow-downs, deaths, joins, drains
    handovers.py  requests that move, with their KV: kv_traffic.py over kv_links.py
    past.py       what replicas did before they were lost
    driver.py     arrivals, faults and a router before the replicas
    records.py    what became of every request
    report.py     percentiles, goodput, utilisation: a dict
    page.py       the same as one HTML page, with plots.py
    replay.py     a recorded live run, taken again

Start with `driver.Simulation`. Time is what the next event says. Knows nothing of tensors, sockets
or files.
"""

from shoal.sim.cost import ModelledCost, StepCost
from shoal.sim.driver import Simulation
from shoal.sim.faults import Fault
from shoal.sim.page import html_page
from shoal.sim.report import summarise
from shoal.sim.setup import ReplicaSetup

__all__ = [
    "Fault",
    "ModelledCost",
    "ReplicaSetup",
    "Simulation",
    "StepCost",
    "html_page",
    "summarise",
]
