"""The cost model: what a split costs on devices, in bytes and seconds, before anything runs.

    loads.py       what a Step asks of a stage: tokens, KV that is read, pairs of attention
    numbers.py     in which precisions weights, activations and KV are kept
    matrices.py    the weights of a shard, as matrices
    memory.py      bytes of weights, KV and activations
    work.py        what a shard reads and computes in a Step
    tables.py      between measured points
    transport.py   messages and collectives
    layers.py      seconds of layers that were measured, by tokens
    constants.py   what a roofline leaves out, of this kind of device or of the nearest
    times.py       seconds of a Step on an instance, and on a replica's stages
    serving.py     TTFT and TPOT of a steady load
    fit.py         constants from measured times

Start with `times.ReplicaCost`. Knows nothing of files, of how a plan is found, or of queues.
"""

from shoal.policy.cost_model.constants import constants_for
from shoal.policy.cost_model.loads import StepLoad, windows_of
from shoal.policy.cost_model.memory import activation_bytes, kv_token_bytes, weight_bytes
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.serving import Served, closed_loop
from shoal.policy.cost_model.times import InstanceCost, ReplicaCost, StepTime

__all__ = [
    "InstanceCost",
    "Numbers",
    "ReplicaCost",
    "Served",
    "StepLoad",
    "StepTime",
    "activation_bytes",
    "closed_loop",
    "constants_for",
    "kv_token_bytes",
    "weight_bytes",
    "windows_of",
]
