"""Architectures, the files they come from, and sampling. `spec` and `store` import no torch."""
