"""What an engine is told (events) and what it asks for (effects).

Knows nothing of who tells or who does it: a live loop, a test, the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.request import ErrorInfo, GenerateRequest, Grammar, Output
from shoal.core.step import InstancesReady, Step, StepFailure, StepResult
from shoal.engine.sequence import GrammarMatcher


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request."""

    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this request any more; unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GrammarStarted:
    """Its compilation has begun; from now on its time limit runs."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GrammarReady:
    request_id: str
    matcher: GrammarMatcher


@dataclass(frozen=True, slots=True)
class GrammarFailed:
    request_id: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Tick:
    """All that was there has been handled: look at deadlines, hand out Steps."""


Event = (
    Submit
    | Cancel
    | GrammarStarted
    | GrammarReady
    | GrammarFailed
    | StepResult
    | StepFailure
    | InstancesReady
    | Tick
)


@dataclass(frozen=True, slots=True)
class RunStep:
    """Hand this Step to the workers."""

    step: Step


@dataclass(frozen=True, slots=True)
class Emit:
    """News for whoever asked."""

    output: Output


@dataclass(frozen=True, slots=True)
class CompileGrammar:
    """Compile off the loop; send GrammarStarted, then GrammarReady or GrammarFailed.

    The matcher must already have consumed `prefix_ids`.
    """

    request_id: str
    grammar: Grammar
    prefix_ids: tuple[int, ...]


Effect = RunStep | Emit | CompileGrammar
