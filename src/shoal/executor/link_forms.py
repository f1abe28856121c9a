"""Which form hidden states take on each link of a replica, from what its workers measured.

"auto" leaves links of instances that compute in float32 alone: who asks for it wants every bit.
Decided once, at the start; a worker that is started again is told the same. Knows nothing of
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shoal.core.link_forms import FormSteps, form_of
from shoal.core.model_spec import ModelSpec
from shoal.core.options import ActivationFormat, EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.policy.compression import Message, Pace, Way, choose, choose_sums
from shoal.wire.worker_messages import Forms, LinkFacts, PaceFacts, Warm
from shoal.worker.place import Place

_SHOWN_TOKENS = 128
_MAX_LINES = 8


class LinkForms:
    """
    Args:
        warm: what every worker said when it was first ready, by instance and rank.

    Attributes:
        lines: what was chosen and why, for people.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        options: EngineOptions,
        spec: ModelSpec,
        warm: Mapping[tuple[int, int], Warm],
    ) -> None:
        self._replica, self._options, self._spec = replica, options, spec
        self._forms: dict[str, Forms] = {}
        lines: list[str] = []
        sums = {i: self._sums(i, warm, lines) for i in {instance for instance, _ in warm}}
        for (instance, rank), said in sorted(warm.items()):
            place = Place(replica, instance, rank)
            links = {link.peer: link for link in said.links if link.peer in _takers(place)}
            steps = dict(self._activations(place, instance, links, said.pace, lines))
            self._forms[place.name] = Forms(steps, sums[instance])
        if len(lines) > _MAX_LINES:
            lines = [*lines[: _MAX_LINES - 1], f"{'':<11}and {len(lines) - _MAX_LINES + 1} more"]
        self.lines = tuple(lines)

    def of(self, worker: str) -> Forms:
        """What a worker, by its name, is to be told."""
        return self._forms.get(worker, Forms({}))

    def _wanted(self, instance: int) -> ActivationFormat:
        wanted = self._options.activation_format
        dtype = self._replica.instances[instance].dtype or self._options.dtype
        return "exact" if wanted == "auto" and dtype == "float32" else wanted

    def _activations(
        self,
        place: Place,
        instance: int,
        links: Mapping[str, LinkFacts],
        facts: PaceFacts | None,
        lines: list[str],
    ) -> Iterator[tuple[str, FormSteps]]:
        if facts is None:
            return
        message = Message(width=self._spec.hidden_size, itemsize=facts.itemsize)
        pace = _pace(facts)
        for peer, link in links.items():
            way = Way(latency_s=link.latency_s, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s)
            steps = choose(self._wanted(instance), message, way, pace)
            lines.append(_line(f"{place.name} to {peer}", steps, message, way, pace))
            yield peer, steps

    def _sums(
        self, instance: int, warm: Mapping[tuple[int, int], Warm], lines: list[str]
    ) -> FormSteps:
        """The same for all ranks of the instance: from the slowest one's facts."""
        plan = self._replica.instances[instance]
        facts = [warm[instance, rank].pace for rank in range(len(plan.ranks))]
        measured = [each for each in facts if each is not None and each.gather_s]
        # Token ranges and joint norms need sums that must not be rounded.
        needs_exact = plan.split.kv == "tokens" or self._spec.qk_norm_joint
        if len(measured) < len(plan.ranks) or needs_exact:
            return ()
        slowest = max(measured, key=lambda each: each.gather_s[-1])
        (small_s, large_s), (small, large) = slowest.gather_s, slowest.gather_bytes
        others = len(plan.ranks) - 1
        bandwidth = others * (large - small) / max(large_s - small_s, 1e-6)
        way = Way(latency_s=small_s, bandwidth_bytes_per_s=bandwidth)
        message, pace = Message(width=self._spec.hidden_size, itemsize=4), _pace(slowest)
        steps = choose_sums(
            self._wanted(instance),
            message,
            way,
            pace,
            num_ranks=len(plan.ranks),
            num_sums=2 * len(plan.layers),
        )
        lines.append(_line(f"sums of instance {instance}", steps, message, way, pace))
        return steps


def _takers(place: Place) -> set[str]:
    return {name for route in place.hops for name in place.takers(route)}


def _pace(facts: PaceFacts) -> Pace:
    return Pace(step_s=facts.step_s, step_tokens=facts.step_tokens, coding_s=facts.coding_s)


def _line(what: str, steps: FormSteps, message: Message, way: Way, pace: Pace) -> str:
    exact_ms = message.seconds(_SHOWN_TOKENS, "exact", way, pace) * 1e3
    measured = f"{way.bandwidth_bytes_per_s * 8 / 1e6:,.0f} Mbit/s, {way.latency_s * 1e6:,.0f} us"
    step_ms = pace.step_of(_SHOWN_TOKENS) * 1e3
    form = form_of(steps, _SHOWN_TOKENS)
    coded_ms = message.seconds(_SHOWN_TOKENS, form, way, pace) * 1e3
    rather = "" if form == "exact" else f" rather than {exact_ms:.1f}"
    named = ", ".join(f"{form} from {least} tokens on" for least, form in steps) or "exact"
    return (
        f"{'links':<10} {what}: {named}; {_SHOWN_TOKENS} tokens take {coded_ms:.1f} ms{rather} "
        f"({measured}), a step of them {step_ms:.0f} ms"
    )
