"""An engine beside chain workers, and the books a test keeps of both."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from chain_worker import EOS, ChainWorkers, expected_output

from shoal.core.request import GenerateRequest, Output, SamplingParams
from shoal.core.step import InstancesReady, Step, StepFailure, StepResult
from shoal.engine.config import EngineConfig
from shoal.engine.events import CompileGrammar, Emit, Event, RunStep, Submit, Tick
from shoal.engine.state import EngineState

VOCAB = 50


@dataclass
class Bench:
    """`rng`: what happens among workers is left to chance; None: the oldest Step comes back."""

    config: EngineConfig
    rng: random.Random | None = None
    now: float = 0.0
    incarnation: int = 0
    down: set[int] = field(default_factory=set)
    in_flight: dict[int, Step] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, Output] = field(default_factory=dict)
    compiling: list[CompileGrammar] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._num_told = 0
        config = self.config
        self.state = EngineState(config)
        self.workers = ChainWorkers(config.instance_blocks, VOCAB, config.routes, self.rng)

    @property
    def steps(self) -> list[Step]:
        """Those that have not come back, oldest first."""
        return list(self.in_flight.values())

    @property
    def num_layers(self) -> int:
        return self.config.routes[0][-1].layers.stop

    def tell(self, *events: Event) -> None:
        for event in [*events, Tick()]:
            for effect in self.state.handle(event, self.now):
                self._carry_out(effect)
        self._num_told += 1
        if self.rng is None or self._num_told % 8 == 0:
            self.state.check_integrity()
        of_route = [step.route for step in self.in_flight.values()]
        assert all(of_route.count(route) <= self.config.steps_per_route for route in of_route)
        assert self.state.num_steps_in_flight == len(of_route)

    def submit(self, request: GenerateRequest) -> None:
        self.outputs[request.request_id] = list(request.output_ids)
        self.tell(Submit(request))

    def step(self) -> None:
        """A Step comes back; with an rng, just something happens."""
        self.now += 0.01
        if not self.in_flight:
            return
        result = self.workers.advance()
        while result is None and self.rng is None:
            result = self.workers.advance()
        if result is not None:
            self.give(result)

    def give(self, result: StepResult) -> None:
        del self.in_flight[result.step_id]
        self.tell(result)

    def fail_step(self) -> None:
        """The oldest Step fails on a single device."""
        if self.in_flight:
            self.fail(step_id=self.steps[0].step_id)

    def fail(
        self,
        *,
        step_id: int | None = None,
        lost: Collection[int] | None = None,
        down: Collection[int] = (),
    ) -> None:
        self.in_flight.clear()
        self.workers.reset(lost)
        self.down |= set(down)
        self.incarnation += 1
        self.tell(
            StepFailure(
                step_id=step_id,
                incarnation=self.incarnation - 1,
                reason="test",
                lost=None if lost is None else tuple(lost),
                down=tuple(down),
            )
        )

    def ready(self, *instances: int) -> None:
        self.down -= set(instances)
        self.tell(InstancesReady(instances))

    def run_out(self) -> None:
        for _ in range(2_000_000):
            if not self.in_flight:
                break
            self.step()
        self.state.check_integrity()
        assert self.state.num_unfinished == 0, "requests are left, but no Step is"
        stats = self.state.stats()
        assert stats.num_blocks_used == 0
        assert stats.num_running == stats.num_waiting == 0

    def expected(self, request: GenerateRequest) -> list[int]:
        """The whole output of a request."""
        sampling, layers = request.sampling, self.num_layers
        limit = sampling.max_tokens or 0
        return expected_output(request.prompt_ids, limit, VOCAB, sampling.seed, layers)

    def _carry_out(self, effect: object) -> None:
        if isinstance(effect, RunStep):
            step = effect.step
            assert 0 < step.num_tokens <= self.config.max_num_batched_tokens
            assert len(step.rows) <= self.config.max_num_seqs
            assert step.incarnation == self.incarnation
            assert self.down.isdisjoint(h.instance for h in self.config.routes[step.route])
            self.in_flight[step.step_id] = step
            self.workers.submit(step)
        elif isinstance(effect, CompileGrammar):
            self.compiling.append(effect)
        elif isinstance(effect, Emit):
            output = effect.output
            assert output.request_id not in self.finished, "news after the terminal event"
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish is not None:
                self.finished[output.request_id] = output


def make_request(request_id: str, prompt: list[int], **fields: object) -> GenerateRequest:
    max_tokens, seed = fields.pop("max_tokens", 8), fields.pop("seed", None)
    return GenerateRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def make_config(**fields: object) -> EngineConfig:
    defaults: dict[str, object] = {
        "instance_blocks": (40,),
        "max_model_len": 200,
        "vocab_size": VOCAB,
        "eos_token_ids": (EOS,),
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "max_waiting": 10_000,
    }
    return EngineConfig(**{**defaults, **fields})  # type: ignore[arg-type]
