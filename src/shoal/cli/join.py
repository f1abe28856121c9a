"""`shoal join`: this machine becomes a node of a cluster."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from shoal.cli.up import Address, Interface, Name, cluster_folder, short_name, start_here
from shoal.core.errors import ConfigError

_HEAD = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}:[0-9]{1,5}")


def join(
    head: Annotated[
        str,
        typer.Argument(metavar="HEAD:PORT", help="As `shoal up` printed it.", show_default=False),
    ],
    token: Annotated[
        str, typer.Option("--token", envvar="SHOAL_TOKEN", help="As `shoal up` printed it.")
    ],
    interface: Interface = None,
    address: Address = None,
    name: Name = None,
) -> None:
    """Let this machine work for a cluster."""
    from shoal.cluster.addresses import address_towards, choose_address
    from shoal.cluster.raylet import require_ray

    require_ray()
    if not _HEAD.fullmatch(head):
        raise ConfigError(f"{head!r} is no HEAD:PORT; copy the line that `shoal up` printed")
    if interface is None and address is None:
        address = address_towards(head.partition(":")[0])
    where, chosen = choose_address(interface, address)
    called = name or short_name()
    seconds = start_here(
        cluster_folder(), head=head, address=chosen, name=called, token=token, is_head=False
    )
    print(f"joined     {head} over {where}, {seconds:.1f} s")
    print(f"Plans call this machine {called} or {chosen}. Leave with: shoal down")
