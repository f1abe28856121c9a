"""Cluster + ModelSpec + Workload + SLO → Plan, with reasons; nothing is loaded, no torch.

    goal.py        what is asked for
    splits.py      heads and FFN columns of a layer over unequal ranks
    quality.py     what fewer bits cost (quality.json)
    bunches.py     arrivals that come in bunches: seats and waits
    formats.py     how weights are kept, by what devices have kernels for
    profiles.py    a tensor-parallel group: times and memory of its layers, split by split
    fill.py        layers over the stages of a pipeline
    bits.py        precisions within a limit of quality; more bits where they are free
    pipeline.py    what a pipeline of groups gives: TPOT, TTFT, requests per second
    prompts.py     a replica that only starts requests
    ceiling.py     what a pipeline can't exceed, for little work
    service.py     the most and the quickest that it can do
    polish.py      other layers and splits, by small moves
    chains.py      every pipeline of a few devices
    choice.py      a replica of a plan
    small.py       the best plan of few devices: all of them are looked at
    latency.py     the same for the least latency at a rate
    inventory.py   many devices, by what they are and which are free
    program.py     a linear program: the most from what there is, and its prices
    pricing.py     pipelines that bring more than their devices' prices
    kv_links.py    how long KV of a prompt takes from host to host
    mix.py         how many of each replica, with or without roles
    roles.py       replicas with roles among many devices, where that is better
    large.py       a good plan of many devices, and a bound on any better one
    more_bits.py   bits of a plan's stages that its pace does not need to lose
    search.py      one of both; where a wish can't be met, the nearest plan
    what_if.py     left out and why; a device less, slower, or more; what other wishes give
    to_plan.py     the outcome as a Plan
    placement.py   a Plan from layers that others gave to devices, overlapping as they may
    explain.py     the outcome for people
    quality_text.py  what its bits cost, for people
    engines.py     the nearest configuration of other engines, and what they can't express

Knows nothing of files but its own data, of sockets or how anything is measured.
"""
