"""Carries out what an engine asks about KV: orders for its workers, news for who moves it.

Part of the live driver. Knows nothing of why KV moves.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.core.kv import KVHop, KVLoan, KVOffer, KVPlace, KVPull, KVSource
from shoal.core.split import Range
from shoal.engine.events import (
    CopyKV,
    DropKV,
    EndLoan,
    GrowLoan,
    KVEffect,
    LendKV,
    PullKV,
    StopKV,
    TellPulled,
)
from shoal.executor.transfers import KVMover
from shoal.wire.messages import Lent, Pulled

TellKV = Callable[[Lent | Pulled], None]


class KVCarrier:
    """Of one engine.

    Args:
        mover: its workers.
        digest: of its KV, for offers.
        tell: told of what is lent, and of what has come.
    """

    def __init__(self, mover: KVMover, digest: str, tell: TellKV) -> None:
        self._mover = mover
        self._digest = digest
        self._tell = tell

    def carry_out(self, effect: KVEffect) -> None:
        match effect:
            case LendKV(loan, names):
                if names:
                    self._mover.lend(loan)
                self._tell(Lent(self._offer(loan, names)))
            case GrowLoan(loan):
                self._mover.lend(loan)
            case EndLoan(lease_id):
                self._mover.end_lease(lease_id)
            case PullKV(pull):
                self._mover.pull(pull)
            case CopyKV(loan, first, hops):
                self._mover.lend(loan)
                sources = self._sources(loan)
                self._mover.pull(KVPull(loan.lease_id, loan.lease_id, first, sources, hops))
            case StopKV(pull_id):
                self._mover.stop(pull_id)
            case DropKV(pull_id):
                self._mover.drop(pull_id)
            case TellPulled(pull_id, num_blocks):
                self._tell(Pulled(pull_id, num_blocks))

    def _offer(self, loan: KVLoan, names: tuple[bytes, ...]) -> KVOffer:
        return KVOffer(loan.lease_id, self._digest, names, self._sources(loan))

    def _sources(self, loan: KVLoan) -> tuple[KVSource, ...]:
        """Who has what of a loan."""
        places = self._mover.places
        return tuple(
            KVSource(place.worker, place.address, _common(hop, place), place.heads)
            for hop in loan.hops
            for place in places
            if place.instance == hop.instance
        )


def _common(hop: KVHop, place: KVPlace) -> Range:
    """Layers of a hop that a worker has."""
    start, stop = max(hop.layers.start, place.layers.start), min(hop.layers.stop, place.layers.stop)
    return Range(start, max(start, stop))
