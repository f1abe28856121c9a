"""Many replicas behind one door: a state machine, its driver, and replica clients.

Knows nothing of HTTP or of text; a request is token ids here.
"""
