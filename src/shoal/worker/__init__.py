"""One device: takes Steps, gives tokens. Knows nothing of requests, queues or HTTP."""
