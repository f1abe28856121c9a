"""Where workers run, and how Steps get to them. Knows nothing of requests."""
