"""How byte-level BPE vocabularies split text before merging, by `tokenizer.ggml.pre`.

A GGUF file names the kind and leaves the rules to the reader. The patterns are those of the
models' own tokenizer.json files; which name means which pattern follows llama.cpp's
`llama-vocab.cpp`. Knows nothing of GGUF or vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizerKind:
    """One way of splitting.

    Attributes:
        patterns: applied one after the other, each to the pieces the last one left; what a
            pattern matches, and what lies between its matches, become pieces.
        ignore_merges: a piece that is a token stays whole, whatever the merges say.
        add_bos: a BOS goes in front unless the file says otherwise.
        nfc: text is brought to Unicode's normal form C first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def pre_tokenizer_kind(name: str) -> PreTokenizerKind:
    """Looks a kind up; an unknown one is an `UnsupportedModelError` that names it."""
    for names, kind in _KINDS:
        if name in names.split():
            return kind
    raise UnsupportedModelError(
        f"the GGUF file's pre-tokenizer is {name!r}, which shoal does not know; "
        "serve the model from its safetensors folder with tokenizer.json instead"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _WORD + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _WORD + r"|\p{N}" + _TAIL
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*" + r"|\p{N}" + _CASED_TAIL
_CLITIC = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = f"{_CASED}*{_LOWER}+{_CLITIC}|{_CASED}+{_LOWER}*{_CLITIC}" + r"|\p{N}{1,3}" + _CASED_TAIL
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")

_KINDS: tuple[tuple[str, PreTokenizerKind], ...] = (
    ("default", PreTokenizerKind(patterns=_DEFAULT)),
    (
        "gpt-2 gpt2 phi-2 gigachat mellum exaone4 mpt olmo jais trillion a.x-4.0",
        PreTokenizerKind(patterns=(_GPT2,)),
    ),
    (
        "smollm starcoder refact command-r codeshell exaone minerva-7b",
        PreTokenizerKind(patterns=(r"\p{N}", _GPT2)),
    ),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizerKind(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizerKind(patterns=(_LLAMA3,))),
    ("glm4", PreTokenizerKind(patterns=(_LLAMA3,), ignore_merges=True)),
    ("qwen2", PreTokenizerKind(patterns=(_QWEN2,), nfc=True)),
    ("qwen35", PreTokenizerKind(patterns=(_QWEN35,), nfc=True)),
    (
        "stablelm2 deepseek-r1-qwen kormo megrez hunyuan solar-open grok-2",
        PreTokenizerKind(patterns=(_QWEN2,)),
    ),
    ("tekken", PreTokenizerKind(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 minimax-m2", PreTokenizerKind(patterns=(_GPT4O,))),
    ("deepseek-v3 hunyuan-dense", PreTokenizerKind(patterns=_DEEPSEEK3)),
    ("deepseek-coder", PreTokenizerKind(patterns=_DEEPSEEK_CODER)),
    ("falcon", PreTokenizerKind(patterns=_FALCON)),
    ("seed-coder", PreTokenizerKind(patterns=(_SEED_CODER,))),
)
