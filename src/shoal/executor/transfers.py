"""How orders about KV get to an executor's workers, and how their pulls end.

    lend, end_lease, pull, drop  ─►  each worker of the instances concerned, in order with its Steps
    Pulled of each of them       ─►  KVArrived, to the engine

A hop has as many whole blocks as the worker of it that has the fewest. Knows nothing of names or
of who lends to whom.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from shoal.core.kv import KVArrived, KVLoan, KVPlace, KVPull
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import ReplicaPlan
from shoal.wire.worker_messages import DropPull, EndLease, LendBlocks, PullBlocks, StopPull

Order = LendBlocks | EndLease | PullBlocks | StopPull | DropPull


class KVMover(Protocol):
    """What of an executor moves KV."""

    @property
    def places(self) -> tuple[KVPlace, ...]:
        """Workers that KV can be got from, where they are now."""

    def lend(self, loan: KVLoan) -> None:
        """Also what became of a loan since."""

    def end_lease(self, lease_id: int) -> None: ...

    def pull(self, pull: KVPull) -> None: ...

    def stop(self, pull_id: int) -> None: ...

    def drop(self, pull_id: int) -> None: ...


@dataclass(slots=True)
class _Pull:
    pull: KVPull
    missing: set[str]
    fewest: dict[int, int]


class WorkerOrders:
    """Makes orders for workers of what a `KVMover` is asked; belongs to one thread.

    Args:
        workers_of: names of an instance's workers.
        send: an order to a worker.
        arrived: told of each pull's end.
    """

    def __init__(
        self,
        workers_of: Callable[[int], Iterable[str]],
        send: Callable[[str, Order], None],
        arrived: Callable[[KVArrived], None],
    ) -> None:
        self._workers_of = workers_of
        self._send = send
        self._arrived = arrived
        self._pulls: dict[int, _Pull] = {}
        self._lent: dict[int, tuple[int, ...]] = {}

    def lend(self, loan: KVLoan) -> None:
        self._lent[loan.lease_id] = tuple(hop.instance for hop in loan.hops)
        for hop in loan.hops:
            order = LendBlocks(loan.lease_id, hop.block_ids, loan.num_ready)
            for worker in self._workers_of(hop.instance):
                self._send(worker, order)

    def end_lease(self, lease_id: int) -> None:
        for instance in self._lent.pop(lease_id, ()):
            for worker in self._workers_of(instance):
                self._send(worker, EndLease(lease_id))

    def pull(self, pull: KVPull) -> None:
        workers = {hop.instance: tuple(self._workers_of(hop.instance)) for hop in pull.hops}
        names = {name for each in workers.values() for name in each}
        fewest = {hop.instance: len(hop.block_ids) for hop in pull.hops}
        self._pulls[pull.pull_id] = _Pull(pull, names, fewest)
        for hop in pull.hops:
            order = PullBlocks(
                pull.pull_id, pull.lease_id, pull.first, pull.sources, hop.layers, hop.block_ids
            )
            for worker in workers[hop.instance]:
                self._send(worker, order)

    def stop(self, pull_id: int) -> None:
        if (stopped := self._pulls.get(pull_id)) is not None:
            for worker in stopped.missing:
                self._send(worker, StopPull(pull_id))

    def drop(self, pull_id: int) -> None:
        if (dropped := self._pulls.pop(pull_id, None)) is None:
            return
        for hop in dropped.pull.hops:
            for worker in self._workers_of(hop.instance):
                self._send(worker, DropPull(pull_id))

    def pulled(self, worker: str, instance: int, pull_id: int, num_blocks: int) -> None:
        """A worker's pull is over."""
        found = self._pulls.get(pull_id)
        if found is None or worker not in found.missing:
            return
        found.missing.discard(worker)
        found.fewest[instance] = min(found.fewest[instance], num_blocks)
        if not found.missing:
            del self._pulls[pull_id]
            whole = tuple(found.fewest[hop.instance] for hop in found.pull.hops)
            self._arrived(KVArrived(pull_id, whole))


class OneWorkerMover:
    """The `KVMover` of a worker in this process.

    Args:
        place: where its KV is to be got from.
        send: an order to it; what `take` does, in order with its Steps.
    """

    def __init__(
        self, place: KVPlace, send: Callable[[Order], None], arrived: Callable[[KVArrived], None]
    ) -> None:
        self.places = (place,)
        self._orders = WorkerOrders(
            lambda _instance: (place.worker,), lambda _name, order: send(order), arrived
        )
        self._lock = threading.Lock()

    def lend(self, loan: KVLoan) -> None:
        with self._lock:
            self._orders.lend(loan)

    def end_lease(self, lease_id: int) -> None:
        with self._lock:
            self._orders.end_lease(lease_id)

    def pull(self, pull: KVPull) -> None:
        with self._lock:
            self._orders.pull(pull)

    def stop(self, pull_id: int) -> None:
        with self._lock:
            self._orders.stop(pull_id)

    def drop(self, pull_id: int) -> None:
        with self._lock:
            self._orders.drop(pull_id)

    def pulled(self, pull_id: int, num_blocks: int) -> None:
        """Its pull is over; from any thread."""
        with self._lock:
            (place,) = self.places
            self._orders.pulled(place.worker, place.instance, pull_id, num_blocks)


class CrewMover:
    """The `KVMover` of workers in processes.

    Args:
        replica_name: under which workers of other replicas know these.
        addresses: of the workers that have one, by name; read from any thread.
        call: has the executor's thread call something, in order.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        spec: ModelSpec,
        replica_name: str,
        *,
        addresses: Callable[[], Mapping[str, str]],
        send: Callable[[str, Order], None],
        call: Callable[..., object],
        arrived: Callable[[KVArrived], None],
    ) -> None:
        self._replica = replica
        # Split by tokens, a sequence's blocks are on several workers: its KV stays there, and is
        # computed anew elsewhere.
        self._stays = any(each.split.kv == "tokens" for each in replica.instances)
        self._spec = spec
        self._arrived = arrived
        self._name = replica_name
        self._addresses = addresses
        self._call = call
        self.orders = WorkerOrders(replica.worker_names, send, arrived)

    @property
    def places(self) -> tuple[KVPlace, ...]:
        known = {} if self._stays else self._addresses()
        return tuple(
            KVPlace(
                f"{self._name}/{name}",
                known[name],
                instance,
                shard.layers,
                shard.kv_heads(self._spec),
            )
            for instance in range(len(self._replica.instances))
            for name, shard in zip(
                self._replica.worker_names(instance), self._replica.shards(instance), strict=True
            )
            if known.get(name)
        )

    def lend(self, loan: KVLoan) -> None:
        if not self._stays:
            self._call(self.orders.lend, loan)

    def end_lease(self, lease_id: int) -> None:
        self._call(self.orders.end_lease, lease_id)

    def pull(self, pull: KVPull) -> None:
        if self._stays:
            self._call(self._arrived, KVArrived(pull.pull_id, (0,) * len(pull.hops)))
        else:
            self._call(self.orders.pull, pull)

    def stop(self, pull_id: int) -> None:
        self._call(self.orders.stop, pull_id)

    def drop(self, pull_id: int) -> None:
        self._call(self.orders.drop, pull_id)
