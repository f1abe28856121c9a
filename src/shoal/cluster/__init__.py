"""The machines that serve together: which interface they meet on, and Ray's processes on each.

    addresses.py    this machine's private addresses
    folder.py       what `shoal up` and `shoal join` write down
    raylet.py       Ray's processes: started, waited for, ended, and no others

Loads no torch.
"""
