"""The nouns of the house, its errors and its clock. Standard library only.

Knows nothing of torch, sockets, HTTP or tokenizers.
"""
