"""Reads a tokenizer from the files of a Hugging Face model folder.

Knows nothing of GGUF, requests or how templates are rendered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from shoal.core.errors import ModelError
from shoal.text.tokenizer_parts import TokenizerParts


def read_folder(folder: Path) -> TokenizerParts:
    """Reads the tokenizer files of a model's folder; raises `ModelError`."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer.model").is_file():
            raise ModelError(
                f"{folder} has only a sentencepiece tokenizer.model; shoal needs tokenizer.json: "
                "convert it with transformers' AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...), or use a GGUF file of the model"
            )
        raise ModelError(f"{folder} has no tokenizer.json; fetch the model's tokenizer files too")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"{file} cannot be read: {error}; fetch it again") from error
    # A saved tokenizer may carry the padding and truncation of its training.
    backend.no_padding()
    backend.no_truncation()
    config = _json_file(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _json_file(folder / "special_tokens_map.json"))
    _apply_bos_and_eos_flags(backend, config, special_tokens)
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=_eos_token_ids(folder, backend, special_tokens),
        chat_template=_template_source(folder, config),
    )


_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def _special_tokens(*configs: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for config in configs:
        for role in _SPECIAL_ROLES:
            token = config.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens.setdefault(role, text)
    return tokens


def _apply_bos_and_eos_flags(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    # As transformers does: the flags, where a config has them, outrank tokenizer.json.
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    pieces, special = ["$A"], []
    for role, position in (("bos", 0), ("eos", len(pieces) + 1)):
        text = special_tokens.get(f"{role}_token")
        token_id = None if text is None else backend.token_to_id(text)
        if config.get(f"add_{role}_token") and text is not None and token_id is not None:
            pieces.insert(position, text)
            special.append((text, token_id))
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


def _eos_token_ids(
    folder: Path, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]
) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        found = _json_file(folder / name).get("eos_token_id")
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found:
            return tuple(dict.fromkeys(found))
    eos = backend.token_to_id(special_tokens.get("eos_token", ""))
    return () if eos is None else (eos,)


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{jinja} is not UTF-8: {error}; fetch it again") from error
    source = config.get("chat_template")
    if source is None:
        source = _json_file(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # [{"name": "default", "template": "..."}, ...]
        named = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if source is not None and not isinstance(source, str):
        raise ModelError(
            f"{folder} has a chat_template of type {type(source).__name__}, not text; "
            "pass one with --chat-template FILE"
        )
    return source


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not an object; fetch it again")
    return content
