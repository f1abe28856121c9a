"""shoal serves one LLM, fast, from GPUs that don't match."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.core.request import SamplingParams

if TYPE_CHECKING:
    from shoal.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # `import shoal` stays light: LLM brings tokenizers and, once used, torch.
    if name == "LLM":
        from shoal.llm import LLM

        return LLM
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
