"""The machines that serve together: what devices and links they have, which interface they meet
on, and Ray's processes on each.

    cluster_file.py    a Cluster from a file (device_fields.py, units.py)
    catalogue.py       devices known by name
    helix.py           a Cluster from another project's file
    addresses.py       this machine's private addresses
    folder.py          what `shoal up` and `shoal join` write down
    raylet.py          Ray's processes: started, waited for, ended, and no others

Loads no torch.
"""
