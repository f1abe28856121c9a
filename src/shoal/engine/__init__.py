"""One replica's engine: a state machine without I/O, and the thin loop that drives it.

Knows nothing of torch, text, HTTP, or how many replicas there are.
"""
