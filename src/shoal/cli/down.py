"""`shoal down`: this machine leaves its cluster; nothing that others started is touched."""

from __future__ import annotations

from shoal.cli.up import cluster_folder


def down() -> None:
    """End what `shoal up` or `shoal join` started on this machine."""
    from shoal.cluster import raylet

    folder = cluster_folder()
    if not folder.path.exists():
        print("no cluster was up here")
        return
    with folder.locked():
        record = folder.read_record()
        if record is not None:
            raylet.end(record)
        folder.remove()
    print("no cluster was up here" if record is None else f"left the cluster at {record.head}")
