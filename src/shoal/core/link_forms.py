"""In which form hidden states cross a link, by how many tokens a message has.

Knows nothing of how it is chosen (policy/compression.py) or what the forms are (comm/codec.py).
"""

from __future__ import annotations

from shoal.core.options import LinkFormat

FormSteps = tuple[tuple[int, LinkFormat], ...]
"""(from so many tokens on, this form), rising; below the first: exact."""


def form_of(steps: FormSteps, num_tokens: int) -> LinkFormat:
    """What was chosen for a message of so many tokens."""
    taken: LinkFormat = "exact"
    for least, form in steps:
        if num_tokens >= least:
            taken = form
    return taken
