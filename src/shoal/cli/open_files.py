"""How many files a process may have open: servers and loads have one for each stream.

Knows nothing of what they are.
"""

from __future__ import annotations

import contextlib
import resource


def allow_files() -> None:
    """As many as may be. Many systems begin with 1,024, for the sake of programs that use
    select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
