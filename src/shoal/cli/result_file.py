"""Where a command was told to write what it found: whole, or an error that says why not."""

from __future__ import annotations

from pathlib import Path

from shoal.core.errors import ConfigError
from shoal.core.whole_file import write_whole


def write_result(path: Path, text: str, flag: str) -> None:
    """
    Args:
        flag: that named the file.

    Raises:
        ConfigError: it can't be written; what was there still is.
    """
    try:
        write_whole(path, text)
    except (OSError, ValueError) as error:  # a name with a zero in it
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot write {path}: {why}; choose another {flag}") from error
