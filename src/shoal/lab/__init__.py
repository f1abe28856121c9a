"""A lab: mixed devices and links pretended on one machine, running the real code.

    file.py      lab.yaml: a plan, hosts, links
    folder.py    what a lab that is up has written down: settings, workers, its server
    links.py     hosts' links as links among workers, which their sockets keep to
    network.py   hosts as network namespaces, where root allows: real sockets, real queues
    server.py    `shoal serve`, detached, and its end

Workers take `settings.json` from SHOAL_LAB_STATE; a lab's devices are slow because workers
stretch what they measure of themselves. Knows nothing of engines, models or HTTP.
"""
