"""The machines that serve together: what devices and links they have, which interface they meet
on, and Ray's processes on each.

    cluster_file.py    a Cluster from a file (device_fields.py, layer_times.py, units.py)
    catalogue.py       devices known by name
    cluster_writer.py  and back to one
    probe_cache.py     what was probed, kept
    helix.py           a Cluster from another project's file (helix_layers.py), and what it gave to
                       which machine (helix_placement.py)
    addresses.py       this machine's private addresses
    folder.py          what `shoal up` and `shoal join` write down
    raylet.py          Ray's processes: started, waited for, ended, and no others

Loads no torch.
"""
