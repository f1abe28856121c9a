"""Which tests pytest-xdist keeps together: all of tests/e2e, and each file of the other folders.

A server's tests share it, and some of them count what is on the machine (network namespaces,
memory that has a name): they run one after the other, in one process.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class ByFolder(LoadScopeScheduling):
    """Work is dealt in the order of the files: e2e comes first, and takes longest."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else nodeid.partition("::")[0]
