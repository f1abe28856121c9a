"""Builds a tokenizer from the metadata of a GGUF file.

    tokenizer.ggml.model   "gpt2": byte-level BPE, merges in the file, split rules by name
                           "llama": sentencepiece BPE, merges implied by the tokens' scores
    tokenizer.ggml.tokens, .token_type, .scores, .merges, .pre, .*_token_id, .add_*

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#ggml. Knows nothing of chat
templates or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from shoal.core.errors import UnsupportedModelError
from shoal.core.gguf_header import Value, read_gguf_header
from shoal.core.gguf_tokens import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, gguf_eos_token_ids
from shoal.text.gguf_fields import GGUFTokenizerFields
from shoal.text.pre_tokenizers import pre_tokenizer_kind
from shoal.text.token_bytes import byte_of_character
from shoal.text.tokenizer_parts import TokenizerParts


def read_gguf(path: Path) -> TokenizerParts:
    """Reads the tokenizer of a GGUF file; raises `ModelError`."""
    metadata = read_gguf_header(path).metadata
    backend = build_gguf_tokenizer(metadata)
    special_tokens = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        text = backend.id_to_token(token_id) if isinstance(token_id, int) else None
        if text is not None:
            special_tokens[f"{role}_token"] = text
    template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=gguf_eos_token_ids(metadata),
        chat_template=template if isinstance(template, str) else None,
    )


def build_gguf_tokenizer(metadata: Mapping[str, Value]) -> Tokenizer:
    """Builds the tokenizer that `metadata` describes.

    Raises:
        ModelError: a field is missing or malformed.
        UnsupportedModelError: a tokenizer model or pre-tokenizer that shoal does not know.
    """
    fields = GGUFTokenizerFields(metadata)
    model = fields.text("model")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(fields)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(fields), True
    else:
        raise UnsupportedModelError(
            f"the GGUF file's tokenizer model is {model!r}; shoal reads 'gpt2' and 'llama': "
            "serve the model from its safetensors folder with tokenizer.json instead"
        )
    _add_bos_and_eos(tokenizer, fields, add_bos)
    return tokenizer


def _byte_level(fields: GGUFTokenizerFields) -> tuple[Tokenizer, bool]:
    # Files from before the key existed were made for GPT-2's rules or llama.cpp's default ones.
    kind = pre_tokenizer_kind(fields.text("pre", default="default"))
    # Both loops are over 10^5 entries and part of every start: hence no call but to C.
    merges = [tuple(merge.split(" ", 1)) for merge in fields.strings("merges")]
    for merge in merges:
        if len(merge) != 2 or not (merge[0] and merge[1]):
            wrong = " ".join(merge)
            raise fields.error("merges", f"holds {wrong!r}, not two tokens with a space between")
    alphabet = byte_of_character()
    is_in_bytes = frozenset(alphabet).issuperset
    byte_name = {byte: character for character, byte in alphabet.items()}
    vocabulary = {}
    for token_id, (token, token_type) in enumerate(fields.typed_tokens()):
        if token_type == NORMAL and not is_in_bytes(token):
            # Converters store some ordinary tokens as plain text; merges spell them in bytes.
            token = "".join(byte_name[byte] for byte in token.encode())
        vocabulary[token] = token_id
    tokenizer = _tokenizer(
        fields, vocabulary, merges, ignore_merges=kind.ignore_merges, byte_fallback=False
    )
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, fields)
    return tokenizer, kind.add_bos


def _sentencepiece(fields: GGUFTokenizerFields) -> Tokenizer:
    vocabulary = {_escaped(token): i for i, (token, _) in enumerate(fields.typed_tokens())}
    tokenizer = _tokenizer(
        fields, vocabulary, _implied_merges(fields), ignore_merges=False, byte_fallback=True
    )
    spaces = normalizers.Replace(" ", "▁")
    space_marks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    add_prefix = fields.flag("add_space_prefix", default=True)
    if add_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        tokenizer.decoder = decoders.Sequence([*space_marks, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(space_marks)
    _add_special_tokens(tokenizer, fields, match_space_runs=not add_prefix)
    return tokenizer


def _implied_merges(fields: GGUFTokenizerFields) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best token first.

    Sentencepiece merges the neighbours whose union scores best; as ranked pairs that is one
    merge for each split of each token, in order of the token's score.
    """
    scores = fields.numbers("scores")
    tokens = [_escaped(token) for token, _ in fields.typed_tokens()]
    known = set(tokens)
    mergeable = [i for i, (_, kind) in enumerate(fields.typed_tokens()) if kind in _MERGEABLE]
    # A run of user-defined tokens shares one score: there the file's order decides.
    mergeable.sort(key=lambda token_id: -scores[token_id])
    merges = []
    for token_id in mergeable:
        token = tokens[token_id]
        for cut in range(len(token) - 1, 0, -1):
            # The shorter test first: most splits fail on it, and this loop is the loading time.
            if token[cut:] in known and token[:cut] in known:
                merges.append((token[:cut], token[cut:]))
    return merges


_MERGEABLE = frozenset((NORMAL, USER_DEFINED))


def _escaped(token: str) -> str:
    return token.replace(" ", "▁")


def _tokenizer(
    fields: GGUFTokenizerFields,
    vocabulary: dict[str, int],
    merges: Sequence[tuple[str, ...]],
    *,
    ignore_merges: bool,
    byte_fallback: bool,
) -> Tokenizer:
    tokens = fields.strings("tokens")
    if len(vocabulary) != len(tokens):
        raise fields.error(
            "tokens", f"holds {len(tokens) - len(vocabulary)} tokens twice; each needs its own text"
        )
    unknown_id = fields.token_id("unknown")
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=cast("list[tuple[str, str]]", merges),
            unk_token=None if unknown_id is None or not byte_fallback else tokens[unknown_id],
            fuse_unk=byte_fallback,
            byte_fallback=byte_fallback,
            ignore_merges=ignore_merges,
        )
    except Exception as error:  # the library raises nothing more precise
        raise fields.error("merges", f"does not fit the tokens: {error}") from error
    return Tokenizer(model)


def _add_special_tokens(
    tokenizer: Tokenizer, fields: GGUFTokenizerFields, *, match_space_runs: bool = False
) -> None:
    control, user_defined = [], []
    for token, token_type in fields.typed_tokens():
        if token_type in (CONTROL, UNKNOWN):
            control.append(AddedToken(token, normalized=False, special=True))
        elif token_type == USER_DEFINED and " " not in token:
            user_defined.append(AddedToken(token, normalized=False, special=False))
        elif token_type == USER_DEFINED and match_space_runs:
            # The vocabulary has it with ▁ for the spaces, so it must be matched after them. A
            # normalizer that puts ▁ in front would do so here too: there, merges find the run.
            user_defined.append(AddedToken(_escaped(token), normalized=True, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)


def _add_bos_and_eos(tokenizer: Tokenizer, fields: GGUFTokenizerFields, add_bos: bool) -> None:
    tokens = fields.strings("tokens")
    bos_id, eos_id = fields.token_id("bos"), fields.token_id("eos")
    pieces, special = ["$A"], []
    if fields.flag("add_bos_token", default=add_bos) and bos_id is not None:
        pieces.insert(0, tokens[bos_id])
        special.append((tokens[bos_id], bos_id))
    if fields.flag("add_eos_token", default=False) and eos_id is not None:
        pieces.append(tokens[eos_id])
        special.append((tokens[eos_id], eos_id))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pieces, special_tokens=special
        )
