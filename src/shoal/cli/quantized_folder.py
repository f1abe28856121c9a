"""Makes the folder that `shoal quantize` leaves: it appears whole, by a rename, or not at all.

    config.json, weights                 written anew
    tokenizer, chat template, licences   copied from a folder, or written from a GGUF file

Knows nothing of flags or of what is shown meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.core.errors import ConfigError, ModelError
from shoal.core.model_spec import ModelSpec

if TYPE_CHECKING:
    from shoal.model.compressed_writer import Progress
    from shoal.model.export_targets import Target


@dataclass(frozen=True, slots=True)
class Source:
    """What is quantised: a safetensors folder or a .gguf file."""

    path: Path
    spec: ModelSpec

    @property
    def size_bytes(self) -> int:
        files = self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def check_output(output: Path) -> None:
    """Raises a ConfigError if something is there already."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output} exists already; choose a folder that is new or empty")


def write_folder(source: Source, targets: list[Target], output: Path, progress: Progress) -> int:
    """Writes everything; returns the bytes of the weights.

    Raises:
        ConfigError: a disk that is full or may not be written.
        ModelError: files of the model that cannot be read.
    """
    from shoal.model.cache import require_space
    from shoal.model.compressed_writer import write_compressed
    from shoal.model.export_targets import quantization_config

    size = sum(plan.num_bytes for target in targets for plan in target.plans())
    with _disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        require_space(output.parent, size)
        with _appearing_whole(output) as folder:
            if source.path.is_dir():
                config = _copy_companions(source.path, folder)
            else:
                config = _write_companions(source, folder)
            config["quantization_config"] = quantization_config(targets)
            _write_json(folder / "config.json", config)
            return write_compressed(folder, targets, progress)


_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


@contextmanager
def _appearing_whole(output: Path) -> Iterator[Path]:
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(
                f"the disk under {output.parent} is full ({error.strerror}); nothing was left "
                "there: free some space, or choose another folder with -o"
            ) from error
        raise ConfigError(
            f"{output} cannot be written: {error.strerror or error}; choose another folder with -o"
        ) from error


def _copy_companions(model: Path, folder: Path) -> dict[str, Any]:
    """Copies what goes with the weights; returns config.json without its quantisation."""
    for pattern in _COMPANIONS:
        for file in model.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    config: dict[str, Any] = json.loads((model / "config.json").read_bytes())
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                holder.pop(key, None)
            for key in ("dtype", "torch_dtype"):
                if holder.get(key) in ("float32", "float64"):
                    holder[key] = "bfloat16"
    return config


def _write_companions(source: Source, folder: Path) -> dict[str, Any]:
    """config.json, generation_config.json and the tokenizer's files of a GGUF file."""
    from shoal.model.hf_config import check_read_back, hf_config
    from shoal.model.hf_spec import read_hf_spec
    from shoal.text.tokenizer import load_tokenizer
    from shoal.text.tokenizer_export import write_tokenizer

    spec = source.spec
    config = hf_config(spec)
    _write_json(folder / "config.json", config)
    check_read_back(spec, read_hf_spec(folder))
    try:
        tokenizer = load_tokenizer(source.path)
    except ModelError as error:
        raise ModelError(f"the tokenizer cannot be written anew: {error}") from error
    write_tokenizer(tokenizer, folder, spec.max_positions)
    ids = list(dict.fromkeys((*tokenizer.eos_token_ids, *spec.eos_token_ids)))
    generation = {"bos_token_id": spec.bos_token_id, "eos_token_id": ids}
    _write_json(folder / "generation_config.json", generation)
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), "utf-8")
