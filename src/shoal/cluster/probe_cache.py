"""What was probed, kept under what the hardware says of itself: other hardware is probed anew.

    FOLDER/<key>.yaml       the cluster file

Knows nothing of how anything is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from shoal.core.whole_file import write_whole

_VERSION = 1


def key_of(machines: Sequence[object]) -> str:
    """From descriptions of machines (their `repr`), in any order."""
    told = "\n".join(sorted(map(repr, machines)))
    return hashlib.sha256(f"{_VERSION}\n{told}".encode()).hexdigest()[:16]


class ProbeCache:
    """One user's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def is_empty(self) -> bool:
        return not self._folder.is_dir()

    def path(self, key: str) -> Path | None:
        """Of a cluster file; None: that hardware was not probed yet."""
        path = self._folder / f"{key}.yaml"
        return path if path.is_file() else None

    def write(self, key: str, text: str) -> Path:
        """
        Raises:
            OSError: it cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{key}.yaml"
        write_whole(path, text)
        return path
