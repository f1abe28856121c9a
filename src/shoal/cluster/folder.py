"""What `shoal up` or `shoal join` has written down on this machine, for its owner's eyes alone.

    token         of the cluster (0600)
    record.json   the session of Ray's processes, addresses, where Ray keeps its files
    ray.log       what Ray's starter said

Knows nothing of how processes are started or ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.core.errors import ConfigError
from shoal.core.whole_file import write_whole

_TOKEN = re.compile(r"[0-9a-f]{32,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Ray's processes on this machine.

    Attributes:
        session, started_s: of the process that leads them, and when it began.
        head: HOST:PORT of the cluster's head.
        address: this machine's.
        name: what plans call this machine.
        files: Ray's folder; it goes with them.
    """

    session: int
    started_s: float
    head: str
    address: str
    name: str
    files: str
    is_head: bool


class ClusterFolder:
    """This machine's folder; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = path / "token"
        self.log = path / "ray.log"
        self._record = path / "record.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time.

        Raises:
            ConfigError: another command is at it.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another command is at this cluster ({self.path}); wait until it is done"
                ) from None
            yield

    def write_token(self, token: str) -> None:
        """
        Raises:
            ConfigError: it is none.
        """
        if not _TOKEN.fullmatch(token):
            raise ConfigError(
                "that is no token of a cluster; copy the line that `shoal up` printed, whole"
            )
        self.token.unlink(missing_ok=True)
        descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token)

    def read_record(self) -> Record | None:
        """None: nothing was started here.

        Raises:
            ConfigError: it cannot be read.
        """
        if not self._record.exists():
            return None
        try:
            return Record(**json.loads(self._record.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self._record} cannot be read ({error}); end what it was about (look for "
                f"processes of ray), and remove {self.path}"
            ) from error

    def write_record(self, record: Record) -> None:
        write_whole(self._record, json.dumps(asdict(record)))

    def remove(self) -> None:
        """All of it."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)
