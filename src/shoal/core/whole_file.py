"""A text file that is written whole or not at all: whoever had it before keeps it until then.

    folder/.shoal-4711-0    all of the text, on the disk
    folder/plan.yaml        renamed to that, in one step

A link stays one: what it names is written. What is no regular file (a terminal, a pipe, /dev/null)
is written to as it is, and so is a file of a folder that takes no other (a single file that a
container was lent). Knows nothing of what is in it.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from contextlib import suppress
from errno import EACCES, EBUSY, EPERM, EXDEV
from pathlib import Path

_DESCRIPTORS = {"/dev/stdout": 1, "/dev/stderr": 2}


def write_whole(path: Path, text: str) -> None:
    """
    Args:
        path: a file that is there keeps its mode, and its owner where that can be.

    Raises:
        OSError: it can't be written; what was there still is.
    """
    data = text.encode("utf-8", "backslashreplace")
    descriptor = _descriptor(path)
    if descriptor is not None:
        _put(os.dup(descriptor), data)
        return
    try:
        before = path.stat()
    except FileNotFoundError:
        before = None
    if before is not None and not stat.S_ISREG(before.st_mode):
        _in_place(path, data)
        return
    target = path.resolve()
    if before is not None:
        os.close(os.open(target, os.O_WRONLY))  # who may not write there shall not replace it
    try:
        _replace(target, data, before)
    except OSError as error:
        if before is None or error.errno not in (EACCES, EPERM, EBUSY, EXDEV):
            raise
        _in_place(target, data)


def _descriptor(path: Path) -> int | None:
    """Of a name for what this process has open: opening it anew would begin at its start."""
    name = str(path)
    if found := re.fullmatch(r"/(?:dev|proc/self)/fd/([0-9]{1,6})", name):
        return int(found[1])
    return _DESCRIPTORS.get(name)


def _replace(target: Path, data: bytes, before: os.stat_result | None) -> None:
    handle, draft = _draft(target.parent)
    try:
        if before is not None:
            with suppress(OSError):
                os.fchown(handle, before.st_uid, before.st_gid)
            with suppress(OSError):
                os.fchmod(handle, stat.S_IMODE(before.st_mode))
        _put(handle, data, to_disk=True)
        draft.replace(target)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    with suppress(OSError):  # some file systems have no folders to sync
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _draft(folder: Path) -> tuple[int, Path]:
    """A file that nobody else has, as open to others as any new one."""
    for number in itertools.count():
        draft = folder / f".shoal-{os.getpid()}-{number}"
        with suppress(FileExistsError):
            return os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), draft
    raise AssertionError("numbers do not end")


def _in_place(path: Path, data: bytes) -> None:
    _put(os.open(path, os.O_WRONLY | os.O_TRUNC), data)


def _put(handle: int, data: bytes, *, to_disk: bool = False) -> None:
    with open(handle, "wb") as file:
        file.write(data)
        file.flush()
        if to_disk:
            os.fsync(handle)
