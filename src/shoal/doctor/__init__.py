"""Best practice as checks: what is found on a machine, in a cluster file or a plan, why it matters.

    finding.py      a check, and what it says
    facts.py        what is known of a machine
    gather.py       from /proc, /sys, limits and the environment
    processor.py    checks of CPUs and memory
    system.py       of files, disk, swap, ports
    gpus.py         of GPUs and their driver
    gpu_links.py    of what joins GPUs
    network.py      of network cards and RDMA
    variables.py    of variables that NCCL, gloo, OpenMP and CUDA read
    versions.py     of several machines that are to work together
    cluster_file.py of a cluster file
    plan.py         of a plan on a cluster

Checks are pure: facts in, findings out. Start with `finding.Check`. Changes nothing on a machine.
"""
