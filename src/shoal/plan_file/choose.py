"""From a plan file or flags to the replicas that run: the one way in for commands and `LLM`."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import ReplicaPlan
from shoal.core.split import KVSplit
from shoal.plan_file.even import even_replicas, share_threads
from shoal.plan_file.machine import num_cpus, num_cuda_devices
from shoal.plan_file.reader import PlanFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """What was said of devices.

    Attributes:
        file: a plan; it says itself what the sizes and `device` would.
        kv_split: what of KV each device that shares a layer keeps; a file says this itself, too.
        data_parallel_size: how often the plan, or each size, is run.
        num_threads: of each replica's CPU ranks together; None: this machine's, shared out.
        hosts_are_apart: hosts that the plan names are other machines (a cluster's), whose devices
            and threads are not ours to count.

    Raises:
        ConfigError: a size below 1, or one that stands beside a file.
    """

    file: PlanFile | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    kv_split: KVSplit = "heads"
    data_parallel_size: int = 1
    device: str = "auto"
    num_threads: int | None = None
    hosts_are_apart: bool = False

    def __post_init__(self) -> None:
        sizes = {
            "--tensor-parallel-size": self.tensor_parallel_size,
            "--pipeline-parallel-size": self.pipeline_parallel_size,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{flag} is {size}; it must be at least 1")
            if self.file is not None and size != 1:
                raise ConfigError(f"{flag} {size} stands beside --plan, which says it; remove one")
        if self.file is not None and self.kv_split != "heads":
            raise ConfigError(
                f"--kv-split {self.kv_split} stands beside --plan; say `split: "
                f"{{kv: {self.kv_split}}}` there"
            )
        if self.file is not None and self.device != "auto":
            raise ConfigError(
                f"--device {self.device} stands beside --plan, which names devices; remove one"
            )

    @property
    def is_plain(self) -> bool:
        """Each replica runs on one device, which need not be known yet."""
        return (
            self.file is None
            and self.tensor_parallel_size == 1
            and self.pipeline_parallel_size == 1
        )

    @property
    def is_open(self) -> bool:
        """Nothing was said of devices."""
        return self.is_plain and self.data_parallel_size == 1 and self.device == "auto"

    def replicas(self, spec: ModelSpec) -> tuple[ReplicaPlan, ...]:
        """What runs.

        Raises:
            ConfigError: what fits neither the model nor this machine.
        """
        num_cuda = num_cuda_devices()
        if self.file is not None:
            known = None if self.hosts_are_apart else num_cuda
            replicas = self.file.resolve(spec, num_cuda=known).replicas * self.data_parallel_size
        else:
            replicas = even_replicas(
                spec,
                tensor_parallel_size=self.tensor_parallel_size,
                pipeline_parallel_size=self.pipeline_parallel_size,
                kv_split=self.kv_split,
                data_parallel_size=self.data_parallel_size,
                device=self.device,
                num_cuda=num_cuda,
            )
        return share_threads(replicas, num_cpus(), self.num_threads, only_here=self.hosts_are_apart)
