"""shoal's own cache folder: where it is, one writer at a time, errors that name the remedy.

    $SHOAL_CACHE, else $XDG_CACHE_HOME/shoal, else ~/.cache/shoal
    └── models/<catalogue name>/<file>      appears by rename, so it is whole or absent

Knows nothing of models, wheels or hubs.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.core.errors import ModelError

_log = logging.getLogger(__name__)


def models_folder() -> Path:
    """Where catalogue models live; it need not exist yet."""
    if chosen := os.environ.get("SHOAL_CACHE"):
        return Path(chosen).expanduser() / "models"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal" / "models"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold `folder`'s lock, made if need be; the kernel drops it if the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process is filling %s: waiting for it", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise a ModelError now rather than fail at the end of a long download."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    available_bytes = shutil.disk_usage(existing).free
    if needed_bytes > available_bytes:
        raise ModelError(_no_space(folder, needed_bytes, available_bytes))


@contextmanager
def plain_disk_errors(folder: Path, needed_bytes: int, cache_variable: str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a ModelError with one remedy.

    Args:
        cache_variable: the environment variable that moves this cache elsewhere.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            available_bytes = shutil.disk_usage(folder).free
            raise ModelError(_no_space(folder, needed_bytes, available_bytes)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelError(
                f"cannot write to the model cache {folder} ({error.strerror}); "
                f"set {cache_variable} to a folder you may write to"
            ) from error
        raise


def human_bytes(num_bytes: float) -> str:
    """1536 → "1.5 KB" (decimal units, as disks and download pages count)."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _no_space(folder: Path, needed_bytes: int, available_bytes: int) -> str:
    return (
        f"the disk under {folder} has {human_bytes(available_bytes)} free, but "
        f"{human_bytes(needed_bytes)} are needed; free some space there"
    )
