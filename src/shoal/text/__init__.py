"""Text to token ids and back: tokenizers, chat templates, detokenising, stop search, grammars.

Knows nothing of torch, HTTP or queues. Grammars are not imported here: `text/grammar.py` brings
in llguidance when the first one is compiled.
"""

from shoal.text.chat_template import ChatTemplate
from shoal.text.text_stream import TextDelta, TextStream
from shoal.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "TextDelta", "TextStream", "Tokenizer", "load_tokenizer"]
