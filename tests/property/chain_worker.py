"""Workers without a model: their KV holds hash chains, so that wrong KV gives wrong tokens.

Slot p of a layer holds hash(slot p-1, what the layer below gave at p); the sampled token is a
function of the last hash of the last layer. What a request produces is thus a pure function of
its prompt: any mix-up of blocks, layers, positions or token references shows as another token.
A row reads what comes before it out of the *blocks it names*, and looks at all of those.

    instance 0   [ Step 4, route 0 ][ Step 6 ]      runs the first of any route whose input is here
    instance 1   [ Step 5, route 1 ]
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shoal.core.plan import Hop, Route
from shoal.core.split import Range
from shoal.core.step import BLOCK_SIZE, RowResult, Step, StepResult, StepRow

EOS = 0
ONE_ROUTE: tuple[Route, ...] = ((Hop(0, Range(0, 1)),),)


def link(parent: int, value: int) -> int:
    return hash((parent, value))


def next_token(chain: int, vocab_size: int, seed: int | None) -> int:
    """Token 0 (EOS) about once in `vocab_size` draws; seeds differ in one draw of eight, so
    that sequences which begin alike part in the middle of blocks."""
    if seed is not None and chain % 8 == 0:
        chain = link(chain, seed)
    return chain % vocab_size


def expected_output(
    prompt: Sequence[int],
    max_tokens: int,
    vocab_size: int,
    seed: int | None = None,
    num_layers: int = 1,
) -> list[int]:
    """What the whole engine must produce for a prompt."""
    chains = [0] * num_layers

    def take(token_id: int) -> None:
        value = token_id
        for layer in range(num_layers):
            value = chains[layer] = link(chains[layer], value)

    for token_id in prompt:
        take(token_id)
    output: list[int] = []
    while len(output) < max_tokens and (not output or output[-1] != EOS):
        output.append(next_token(chains[-1], vocab_size, seed))
        take(output[-1])
    return output


@dataclass(slots=True)
class _Running:
    """A Step on its way: what the last hop that ran gave for each new token of each row."""

    step: Step
    route: Route
    next_hop: int = 0
    values: tuple[list[int], ...] | None = None

    @property
    def num_hops(self) -> int:
        return len(self.route) if self.step.num_hops is None else self.step.num_hops


class _Instance:
    """KV of one instance, and the sequences it was told of."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._slots: dict[tuple[int, int], int] = {}
        # Of a value: the first one of its block, and the last one of the block before.
        self._before: dict[int, tuple[int, int]] = {}
        self.known: dict[int, int | None] = {}
        self.num_tokens = 0

    def lose(self) -> None:
        self._slots.clear()

    def forget(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            self.known.pop(sequence_id, None)

    def copy(self, block: int, layer: int, source: _Instance, source_block: int) -> None:
        """KV of one layer of a block, from another instance."""
        self._before.update(source._before)
        for offset in range(BLOCK_SIZE):
            value = source._slots[source_block * BLOCK_SIZE + offset, layer]
            self._slots[block * BLOCK_SIZE + offset, layer] = value

    def spoil(self, block: int, layer: int) -> None:
        """KV of nothing, as of a copy that did not end."""
        for offset in range(BLOCK_SIZE):
            self._slots[block * BLOCK_SIZE + offset, layer] = -1 - offset

    def run(self, step: Step, hop: int, layers: Range, values: tuple[list[int], ...]) -> None:
        """Change `values` from what goes into the layers to what comes out."""
        self.forget(step.released)
        for row, row_values in zip(step.rows, values, strict=True):
            if row.start_state is not None:
                self.known[row.sequence_id] = row.start_state.sampling.seed
            assert row.sequence_id in self.known, "a row of a sequence the worker does not know"
            assert len(row.block_ids[hop]) == -(-row.end // BLOCK_SIZE)
            assert all(0 <= block < self._num_blocks for block in row.block_ids[hop])
            self.num_tokens += len(row_values)
            for layer in range(layers.start, layers.stop):
                self._run_layer(row, row.block_ids[hop], layer, row_values)

    def _run_layer(
        self, row: StepRow, blocks: tuple[int, ...], layer: int, values: list[int]
    ) -> None:
        chain = self._look_back(row.start, blocks, layer)
        for index in range(len(values)):
            block, offset = divmod(row.start + index, BLOCK_SIZE)
            first, last_before = self._before.get(chain, (0, 0))
            chain, before = link(chain, values[index]), chain
            values[index] = chain
            is_first = offset == 0
            self._before[chain] = (chain, before) if is_first else (first, last_before)
            self._slots[blocks[block] * BLOCK_SIZE + offset, layer] = chain

    def _look_back(self, start: int, blocks: tuple[int, ...], layer: int) -> int:
        """The last value before `start`; all blocks must hold what led to it."""
        if start == 0:
            return 0
        chain = value = self._slots[self._slot(start - 1, blocks), layer]
        for index in range((start - 1) // BLOCK_SIZE, -1, -1):
            first, last_before = self._before[value]
            assert self._slots[blocks[index] * BLOCK_SIZE, layer] == first, "KV of something else"
            if index:
                value = self._slots[self._slot(index * BLOCK_SIZE - 1, blocks), layer]
                assert value == last_before, "KV of something else"
        return chain

    def _slot(self, position: int, blocks: tuple[int, ...]) -> int:
        return blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


class ChainWorkers:
    """Instances that run Steps hop by hop; `advance` is called when something shall happen.

    Args:
        rng: which of the things that could happen does; None: the oldest Step goes on.
    """

    def __init__(
        self,
        instance_blocks: Sequence[int],
        vocab_size: int,
        routes: tuple[Route, ...] = ONE_ROUTE,
        rng: random.Random | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._routes = routes
        self._rng = rng
        self._sampled: dict[tuple[int, int], int] = {}
        self._queues: dict[tuple[int, int], deque[_Running]] = defaultdict(deque)
        self._outboxes: dict[int, deque[StepResult]] = defaultdict(deque)
        self.instances = [_Instance(num_blocks) for num_blocks in instance_blocks]

    @property
    def num_known_sequences(self) -> int:
        return max(len(instance.known) for instance in self.instances)

    def submit(self, step: Step) -> None:
        route = self._routes[step.route]
        assert len({row.sequence_id for row in step.rows}) == len(step.rows)
        assert all(row.num_tokens and len(row.block_ids) == len(route) for row in step.rows)
        assert step.num_hops is None or 0 < step.num_hops < len(route)
        assert step.num_hops is None or not any(row.samples for row in step.rows)
        on_route = {hop.instance for hop in route[: step.num_hops]}
        for number, instance in enumerate(self.instances):
            if number not in on_route:  # as executors do
                instance.forget(step.released)
        running = _Running(step, route)
        for hop in route[: running.num_hops]:
            self._queues[hop.instance, step.route].append(running)

    def run(self, step: Step) -> StepResult:
        """Submit it, and wait for it."""
        self.submit(step)
        while (result := self.advance()) is None:
            pass
        return result

    def advance(self) -> StepResult | None:
        """An instance runs a Step, or a result that is there arrives."""
        ready = self.ready()
        results = [instance for instance, outbox in self._outboxes.items() if outbox]
        assert ready or results, "Steps wait for each other"
        if self._rng is None:
            choice = 0 if results else 1 + ready.index(min(ready, key=self._age))
        else:
            choice = self._rng.randrange(len(results) + len(ready)) - len(results) + 1
        if choice < 1:
            return self._outboxes[results[choice - 1]].popleft()
        self.run_one(*ready[choice - 1])
        return None

    def ready(self) -> list[tuple[int, int]]:
        """(instance, route) of Steps that could run now."""
        return [
            (instance, route)
            for (instance, route), queue in self._queues.items()
            if queue and self._is_ready(queue[0], instance)
        ]

    def run_one(self, instance: int, route: int) -> None:
        """Let an instance run its first Step of a route."""
        running = self._queues[instance, route].popleft()
        step, number = running.step, running.next_hop
        hop = running.route[number]
        values = running.values or tuple(self._tokens(row) for row in step.rows)
        self.instances[instance].run(step, number, hop.layers, values)
        running.values, running.next_hop = values, number + 1
        if running.next_hop == running.num_hops:
            rows = tuple(
                self._sample(step, index, row, values[index][-1])
                for index, row in enumerate(step.rows)
            )
            result = StepResult(step_id=step.step_id, incarnation=step.incarnation, rows=rows)
            self._outboxes[instance].append(result)

    def results(self) -> list[StepResult]:
        """All that are there."""
        found = [result for outbox in self._outboxes.values() for result in outbox]
        self._outboxes.clear()
        return found

    def reset(self, lost: Collection[int] | None = None) -> None:
        """Abandon all Steps; `lost` instances (None: all) lose their KV as well."""
        self._sampled.clear()
        self._queues.clear()
        self._outboxes.clear()
        for index, instance in enumerate(self.instances):
            instance.known.clear()
            if lost is None or index in lost:
                instance.lose()

    def _age(self, ready: tuple[int, int]) -> int:
        return self._queues[ready][0].step.step_id

    def _is_ready(self, running: _Running, instance: int) -> bool:
        if running.route[running.next_hop].instance != instance:
            return False
        refs = (row.token_ref for row in running.step.rows if running.next_hop == 0)
        return all(ref is None or (ref.step_id, ref.row) in self._sampled for ref in refs)

    def _tokens(self, row: StepRow) -> list[int]:
        tokens = list(row.token_ids)
        if row.token_ref is not None:
            tokens.append(self._sampled[row.token_ref.step_id, row.token_ref.row])
        return tokens

    def _sample(self, step: Step, index: int, row: StepRow, chain: int) -> RowResult:
        if not row.samples:
            return RowResult()
        last = self.instances[self._routes[step.route][-1].instance]
        token_id = next_token(chain, self._vocab_size, last.known[row.sequence_id])
        if row.mask is not None:
            bits = int.from_bytes(row.mask, "little")
            allowed = [token for token in range(self._vocab_size) if bits >> token & 1]
            token_id = allowed[chain % len(allowed)]
        self._sampled[step.step_id, index] = token_id
        return RowResult(token_id=token_id)
