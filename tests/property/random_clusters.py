"""Small clusters and models at random, from a seed: several kinds, hosts and links.

Layers up to 12, 4 heads, FFN columns in sixteenths; devices differ in bandwidth, arithmetic, memory
and price, hosts in their links, and one pair of hosts may have a link of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from shoal.core.cluster import Between, Cluster, Device, Host, Link
from shoal.core.latency import Slo
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.planner.goal import Goal

NUM_HEADS = 4


@dataclass(frozen=True, slots=True)
class Kind:
    rate: float
    flops: float
    memory: int
    usd: float


def random_spec(rng: Random) -> ModelSpec:
    num_layers = rng.randint(4, 12)
    return ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=64 * NUM_HEADS,
        num_heads=NUM_HEADS,
        num_kv_heads=rng.choice([1, 2, 4]),
        head_dim=64,
        ffn_size=512 * rng.randint(1, 6),
        vocab_size=rng.choice([4096, 32_000]),
        norm_eps=1e-5,
        layers=(LayerSpec(rope=RopeSpec()),) * num_layers,
        max_positions=4096,
        attention_scale=0.125,
        tied_embeddings=False,
    )


def random_cluster(rng: Random, num_devices: int) -> Cluster:
    """Up to three kinds on up to three hosts."""
    kinds = [
        Kind(
            rate=rng.choice([1.0, 0.8, 0.5, 0.25]),
            flops=rng.choice([0.5e12, 1e12, 5e12]),
            memory=rng.choice([60, 80, 110, 150, 400]) << 20,
            usd=rng.choice([0.3, 1.0, 2.1]),
        )
        for _ in range(rng.randint(1, 3))
    ]
    names = "abc"[: rng.randint(1, min(3, num_devices))]
    devices = []
    for index in range(num_devices):
        kind = kinds[rng.randrange(len(kinds))]
        devices.append(
            Device(
                name=f"d{index}",
                kind=f"kind-{kinds.index(kind)}",
                host=names[index % len(names)],
                device=f"cuda:{index}",
                memory_bytes=kind.memory,
                bandwidth_bytes_per_s=kind.rate * 100e9,
                flops=(("bfloat16", kind.rate * kind.flops),),
                precisions=("bfloat16", "int8", "int4"),
                launch_s=1e-6,
                usd_per_hour=kind.usd,
            )
        )
    hosts = tuple(Host(name=each, link=_link(rng, (2e-6, 20e-6), (5e9, 20e9))) for each in names)
    links: tuple[Between, ...] = ()
    if len(names) == 3 and rng.random() < 0.5:
        links = (Between("a", "b", _link(rng, (5e-6,), (10e9,))),)
    network = _link(rng, (20e-6, 300e-6), (1e9, 5e9))
    return Cluster(hosts=hosts, devices=tuple(devices), network=network, links=links)


def random_goal(rng: Random) -> Goal:
    """Without an objective of its own; half of them with bounds of TPOT or TTFT."""
    return Goal(
        input_tokens=rng.choice([64.0, 400.0, 1200.0]),
        output_tokens=rng.choice([32.0, 128.0]),
        slo=Slo(
            tpot_s=rng.choice([None, None, 0.002, 0.004, 0.02]),
            ttft_s=rng.choice([None, None, 0.02, 0.1]),
        ),
        max_concurrency=8,
    )


def _link(rng: Random, latencies_s: tuple[float, ...], rates: tuple[float, ...]) -> Link:
    return Link(
        latency_s=rng.choice(latencies_s),
        bytes_per_s=rng.choice(rates),
        kind=rng.choice(["pcie4", "nvlink4"]),
    )
