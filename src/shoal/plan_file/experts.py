"""Who has which experts, as a plan file says it.

    experts: [6, 2]                          so many for each rank, from the first on
    experts: [[0-6, 6*0.5], [6*0.5, 7]]      a list for each rank; half of expert 6's tokens each
    experts: {0-4: [6, 2], 4-8: [2, 6]}      by layers; those that are not named: by weights

Ranges as everywhere: 0-6 are 0 to 5. Ranks take an expert's tokens in their order. Knows nothing
of devices.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shoal.core.model_spec import ModelSpec
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare, Range
from shoal.plan_file.fields import Field

_MAX_EXPERTS = 1 << 16
_NEEDED = "an expert (7), a range of them (0-6), or a part of one's tokens (6*0.5)"
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class _Some:
    """Experts that a rank has, and what part of their tokens."""

    place: Field
    experts: Range
    part: float


@dataclass(frozen=True, slots=True)
class _DealingDraft:
    """For each rank: how many experts, or which."""

    place: Field
    sizes: tuple[int, ...]
    lists: tuple[tuple[_Some, ...], ...]


@dataclass(frozen=True, slots=True)
class ExpertsDraft:
    """Dealings by layers, or one for all of the instance."""

    place: Field
    for_all: _DealingDraft | None
    by_layers: tuple[tuple[Field, Range, _DealingDraft], ...] = ()


def draft_experts(place: Field, max_ranks: int) -> ExpertsDraft:
    """What the key `experts` says.

    Raises:
        ConfigError: with file and line.
    """
    if not place.is_mapping:
        return ExpertsDraft(place, _dealing(place, max_ranks))
    return ExpertsDraft(
        place,
        None,
        tuple(
            (each, _layers_of(name, each), _dealing(each, max_ranks))
            for name, each in place.entries().items()
        ),
    )


def resolve_experts(
    draft: ExpertsDraft | None,
    by_weight: tuple[Dealing, ...],
    num_ranks: int,
    spec: ModelSpec,
    layers: Range,
) -> tuple[Dealing, ...]:
    """`Split.experts` of an instance that holds `layers`.

    Raises:
        ConfigError: with file and line: what doesn't fit the model.
    """
    if draft is None:
        return by_weight
    if spec.experts is None:
        raise draft.place.error("this model has no experts; remove the key")
    if draft.for_all is not None:
        return (_resolved(draft.for_all, spec.experts.num_experts, num_ranks),)
    found = {layer: by_weight[0] for layer in _numbers(layers) if spec.layers[layer].has_experts}
    for place, named, dealing in draft.by_layers:
        if not layers.holds(named):
            raise place.error(
                f"layers {named.start}-{named.stop} are dealt here, but the instance holds "
                f"{layers.start}-{layers.stop}; name some of these"
            )
        for layer in set(_numbers(named)) & found.keys():
            found[layer] = _resolved(dealing, spec.experts.num_experts, num_ranks)
    return tuple(found.get(layer, ()) for layer in _numbers(layers))


def dump_experts(experts: tuple[Dealing, ...], layers: Range) -> object:
    """As `draft_experts` reads it; shares are in the order of ranks."""
    if len(experts) == 1:
        return _dumped(experts[0])
    content: dict[str, object] = {}
    start = layers.start
    for dealing, same in itertools.groupby(experts):
        stop = start + len(list(same))
        if dealing:
            content[f"{start}-{stop}"] = _dumped(dealing)
        start = stop
    return content


def _dealing(place: Field, max_ranks: int) -> _DealingDraft:
    ranks = place.items(max_ranks)
    if any(each.is_list for each in ranks):
        lists = tuple(tuple(map(_some, each.items(_MAX_EXPERTS, least=0))) for each in ranks)
        return _DealingDraft(place, (), lists)
    return _DealingDraft(place, tuple(each.integer(0, _MAX_EXPERTS) for each in ranks), ())


def _some(place: Field) -> _Some:
    text = place.text()
    if re.fullmatch(r"[0-9]{1,5}", text):
        return _Some(place, Range(int(text), int(text) + 1), 1.0)
    if found := re.fullmatch(r"([0-9]{1,5}) *\* *([0-9.]{1,24})", text):
        try:
            part = float(found[2])
        except ValueError:
            raise place.wrong(_NEEDED) from None
        if not 0 < part <= 1:
            raise place.error(f"{part} of an expert's tokens; give a part above 0, 1 at most")
        return _Some(place, Range(int(found[1]), int(found[1]) + 1), part)
    if "-" not in text:
        raise place.wrong(_NEEDED)
    return _Some(place, place.range(), 1.0)


def _layers_of(name: str, place: Field) -> Range:
    found = re.fullmatch(r"([0-9]{1,5}) *- *([0-9]{1,5})", name)
    if not found or int(found[1]) > int(found[2]):
        raise place.error(f"{name!r} are no layers; write a range such as 4-21, or a list for all")
    return Range(int(found[1]), int(found[2]))


def _resolved(draft: _DealingDraft, num_experts: int, num_ranks: int) -> Dealing:
    if len(draft.sizes or draft.lists) != num_ranks:
        raise draft.place.error(
            f"experts are dealt to {len(draft.sizes or draft.lists)} ranks, but {num_ranks} "
            "devices are named; say it for each"
        )
    if draft.sizes:
        return _by_sizes(draft, num_experts)
    done = [0.0] * num_experts
    ranks = []
    for some_of_rank in draft.lists:
        shares = []
        for some in some_of_rank:
            if some.experts.stop > num_experts:
                raise some.place.error(
                    f"expert {some.experts.stop - 1} is dealt; this model has 0 to "
                    f"{num_experts - 1}: name one of these"
                )
            for expert in _numbers(some.experts):
                shares.append(_share(some, expert, done))
        counts = Counter(share.expert for share in shares)
        if twice := [expert for expert, count in counts.items() if count > 1]:
            raise draft.place.error(
                f"expert {twice[0]} stands twice in one list; add its parts up, or give them to "
                "two ranks"
            )
        ranks.append(sorted(shares))
    for expert, part in enumerate(done):
        if abs(part - 1) > _ROUNDING:
            raise draft.place.error(
                f"expert {expert} is dealt for {part:g} of its tokens; let the parts of all ranks "
                "add up to 1"
            )
    # The last share of an expert ends where its tokens do: thirds are not written out.
    last = {share.expert: rank for rank, shares in enumerate(ranks) for share in shares}
    return tuple(
        tuple(
            replace(share, stop=WHOLE_SHARE) if last[share.expert] == rank else share
            for share in shares
        )
        for rank, shares in enumerate(ranks)
    )


def _share(some: _Some, expert: int, done: list[float]) -> ExpertShare:
    """The next part of the expert's tokens."""
    start = done[expert]
    done[expert] += some.part
    if done[expert] > 1 + _ROUNDING:
        raise some.place.error(
            f"expert {expert} is dealt for {done[expert]:g} of its tokens by then; give parts that "
            "add up to 1 (6*0.5), or remove it here"
        )
    start, stop = (min(round(end * WHOLE_SHARE), WHOLE_SHARE) for end in (start, done[expert]))
    return ExpertShare(expert, start, stop)


def _by_sizes(draft: _DealingDraft, num_experts: int) -> Dealing:
    if sum(draft.sizes) != num_experts:
        raise draft.place.error(
            f"experts are {list(draft.sizes)}, {sum(draft.sizes)} in all; this model has "
            f"{num_experts}: make them add up to that"
        )
    ends = itertools.accumulate(draft.sizes, initial=0)
    return tuple(
        tuple(ExpertShare(expert) for expert in range(start, stop))
        for start, stop in itertools.pairwise(ends)
    )


def _dumped(dealing: Dealing) -> list[list[int | str]]:
    return [list(_items(shares)) for shares in dealing]


def _items(shares: Sequence[ExpertShare]) -> Iterator[int | str]:
    def run(numbered: tuple[int, ExpertShare]) -> tuple[int, int]:
        """The same for consecutive whole experts, and for nothing else."""
        index, share = numbered
        part = share.stop - share.start
        return (share.expert - index, part) if part == WHOLE_SHARE else (-1 - index, part)

    for (_, part), same in itertools.groupby(enumerate(shares), run):
        first, *rest = (share for _, share in same)
        if part != WHOLE_SHARE:
            yield f"{first.expert}*{part / WHOLE_SHARE:.16f}".rstrip("0")
        else:
            yield f"{first.expert}-{rest[-1].expert + 1}" if rest else first.expert


def _numbers(each: Range) -> range:
    return range(each.start, each.stop)
