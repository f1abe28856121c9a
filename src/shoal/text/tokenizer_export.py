"""Writes a tokenizer as the files of a Hugging Face folder: for models that came without them.

What `tokenizer_folder.py` and transformers read. Knows nothing of where it came from.
"""

from __future__ import annotations

import json
from pathlib import Path

from shoal.text.tokenizer import Tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json, and chat_template.jinja if there is a template.

    Args:
        max_length: tokens of the longest context.
    """
    (folder / "tokenizer.json").write_text(tokenizer.json, "utf-8")
    # No add_bos_token: what goes in front stands in tokenizer.json already.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template.source, "utf-8")
