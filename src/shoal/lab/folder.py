"""What a lab that is up has written down, in a folder of its own.

    plan.yaml               what its server runs
    settings.json           speeds, links, hosts: read by the server, again when it changes
    settings.json.workers*  name → process, written by each of its engines
    record.json             the server's process, its address, the workers' names
    server.log              what the server said

Files appear by rename, so each is whole. Knows nothing of how a lab is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.core.errors import ConfigError
from shoal.core.whole_file import write_whole

STATE_VARIABLE = "SHOAL_LAB_STATE"


@dataclass(frozen=True, slots=True)
class LinkState:
    """What sockets make of a link; bandwidth in bytes, latency in seconds."""

    cut: bool = False
    bandwidth: float | None = None
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class HostState:
    """How to start a process on a host (what its argv goes behind), and where it is reached."""

    command: tuple[str, ...] = ()
    address: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Settings:
    """What workers keep to.

    Attributes:
        speeds: of workers, by name.
        links: among workers, by "NAME|NAME".
        hosts: by name.
    """

    speeds: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, LinkState] = field(default_factory=dict)
    hosts: Mapping[str, HostState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A lab that is up.

    Attributes:
        server_pid, server_started_s: of its process: when it began tells it from a later one.
        workers: name → the host it runs on, "" without hosts.
        cuts: pairs of hosts or workers that do not hear each other.
        links: pairs of hosts, by "a|b" → bytes a second; None: as fast as it goes.
    """

    server_pid: int
    server_started_s: float
    url: str = ""
    has_namespaces: bool = False
    workers: Mapping[str, str] = field(default_factory=dict)
    cuts: tuple[tuple[str, str], ...] = ()
    links: Mapping[str, float | None] = field(default_factory=dict)


class LabFolder:
    """One lab's folder; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.yaml"
        self.settings = path / "settings.json"
        self.log = path / "server.log"
        self._record = path / "record.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time; the kernel lets go if it dies.

        Raises:
            ConfigError: another command is at it.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self.path / ".lock").open("w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"another command is at this lab ({self.path}); wait until it is done"
                    ) from None
                if os.fstat(handle.fileno()).st_nlink == 0:
                    continue  # the folder was removed before its lock was ours
                yield
                return

    def read_settings(self) -> Settings:
        return _settings(_read(self.settings))

    def write_settings(self, settings: Settings) -> None:
        write_whole(self.settings, json.dumps(asdict(settings), indent=1))

    @property
    def has_record(self) -> bool:
        return self._record.exists()

    def read_record(self) -> Record | None:
        """None: no lab is up, or one that did not get as far as starting its server."""
        if not self.has_record:
            return None
        read = _read(self._record)
        try:
            read["cuts"] = tuple((one, other) for one, other in read["cuts"])
            return Record(**read)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self._record, error) from error

    def write_record(self, record: Record) -> None:
        write_whole(self._record, json.dumps(asdict(record), indent=1))

    def worker_pids(self) -> dict[str, int]:
        """Of the workers that the server last started; the first replica's by short names too."""
        found: dict[str, int] = {}
        for path in sorted(self.path.glob(f"{self.settings.name}.workers*")):
            replica = path.name.removeprefix(f"{self.settings.name}.workers").removeprefix(".")
            for name, pid in _read(path).items():
                if not isinstance(pid, int):
                    raise _damaged(path, f"{pid!r} is no process")
                if replica:
                    found[f"{replica}/{name}"] = pid
                if replica in ("", "replica-0"):
                    found[str(name)] = pid
        return found

    def clear(self) -> None:
        """Remove all of it but the lock, which is held."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    def remove(self) -> None:
        """Remove the lock too, and the folder."""
        shutil.rmtree(self.path)
        with contextlib.suppress(OSError):  # other labs are there
            self.path.parent.rmdir()


def state_of_environment(environ: Mapping[str, str]) -> Settings | None:
    """The lab that this process runs in; None: none."""
    named = environ.get(STATE_VARIABLE)
    return _settings(_read(Path(named))) if named else None


def _settings(read: Mapping[str, Any]) -> Settings:
    return Settings(
        speeds=dict(read.get("speeds", {})),
        links={name: LinkState(**link) for name, link in read.get("links", {}).items()},
        hosts={
            name: HostState(tuple(host["command"]), host["address"])
            for name, host in read.get("hosts", {}).items()
        },
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> ConfigError:
    return ConfigError(f"the lab's {path} cannot be read ({why}); take it down: shoal lab down")
