"""Decisions as pure functions of what is known: shared by the live system and a simulator.

Knows nothing of clocks, sockets, requests or torch.
"""
