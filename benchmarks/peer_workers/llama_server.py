"""llama.cpp's own HTTP server, as the wheel of xllamacpp brings it, until it is killed.

    python llama_server.py MODEL.gguf NAME PORT [API_KEY]

Runs in that environment.
"""

from __future__ import annotations

import sys
from threading import Event

import xllamacpp  # type: ignore[import-not-found]


def main() -> None:
    model, name, port, *keys = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = model, {name}
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel, params.n_ctx = 4, 8192
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.api_keys = keys
    server = xllamacpp.Server(params)
    sys.stderr.write(f"listens at {server.listening_address}\n")
    Event().wait()


if __name__ == "__main__":
    main()
