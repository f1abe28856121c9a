"""Measures devices, links and disks: a process on each device, and who asks them.

    cpu.py, cuda.py    a device: memory, bandwidth, products, launches
    rounds.py          how often something runs in so many seconds, on a device of a lab too
    disk.py            how fast weights are read
    ways.py            messages to another process, sums among several
    process.py         the process: does what it is told, one thing at a time
    survey.py          starts them, asks them, in an order that keeps them out of each other's way
    found.py           what they said as a Cluster, with remarks
    checks.py          where the driver's word and the measurement disagree

Loads no model. Knows nothing of plans.
"""
