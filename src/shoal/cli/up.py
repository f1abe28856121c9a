"""`shoal up`: this machine becomes the head of a cluster."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
import time
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.core.errors import ConfigError

if TYPE_CHECKING:
    from shoal.cluster.folder import ClusterFolder

Interface = Annotated[
    str | None,
    typer.Option("--interface", help="Of the private network that the machines share."),
]
Address = Annotated[
    str | None, typer.Option("--address", help="This machine's, instead of an interface.")
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What plans call this machine.  [default: its host name]"),
]

_TOKEN_BYTES = 32


def up(interface: Interface = None, address: Address = None, name: Name = None) -> None:
    """Start a cluster here, over Ray; others join it."""
    from shoal.cluster.addresses import choose_address, free_port
    from shoal.cluster.raylet import require_ray

    version = require_ray()
    where, chosen = choose_address(interface, address)
    folder = cluster_folder()
    head = f"{chosen}:{free_port(chosen)}"
    token = secrets.token_hex(_TOKEN_BYTES)
    seconds = start_here(
        folder, head=head, address=chosen, name=name or short_name(), token=token, is_head=True
    )
    print(f"cluster    up at {head} over {where} (Ray {version}), {seconds:.1f} s")
    print("On each other machine:")
    print(f"  shoal join {head} --token {token}")
    print("Then here, with a plan whose devices name hosts:")
    print("  shoal serve MODEL --plan plan.yaml")
    print(f"This one is called {name or short_name()} or {chosen}. End it with: shoal down")


def cluster_folder() -> ClusterFolder:
    """What is written down on this machine."""
    from shoal.cluster.folder import ClusterFolder
    from shoal.model.cache import models_folder

    return ClusterFolder(models_folder().parent / "cluster")


def short_name() -> str:
    """Of this machine, without its domain."""
    return socket.gethostname().partition(".")[0]


def start_here(
    folder: ClusterFolder, *, head: str, address: str, name: str, token: str, is_head: bool
) -> float:
    """Start Ray's processes and wait for them; the seconds it took.

    Raises:
        ConfigError: they did not start, or some are here already.
    """
    from shoal.cluster import raylet
    from shoal.executor.ray_launcher import ray_environment

    started_s = time.perf_counter()
    with folder.locked():
        _refuse_second(folder)
        folder.write_token(token)
        files = tempfile.mkdtemp(prefix="shoal-ray-")
        record = None
        try:
            record = raylet.start(
                head=head,
                address=address,
                name=name,
                files=files,
                is_head=is_head,
                env=ray_environment(folder.token),
                log=folder.log,
            )
            folder.write_record(record)
            raylet.wait_ready(record, folder.log)
        except BaseException:
            if record is not None:
                raylet.end(record)
            shutil.rmtree(files, ignore_errors=True)
            folder.remove()
            raise
    return time.perf_counter() - started_s


def _refuse_second(folder: ClusterFolder) -> None:
    from shoal.cluster import raylet

    record = folder.read_record()
    if record is None:
        return
    if raylet.is_alive(record):
        raise ConfigError(
            f"this machine is in a cluster already (its head: {record.head}); leave it first: "
            "shoal down"
        )
    raylet.end(record)  # what a crash has left
