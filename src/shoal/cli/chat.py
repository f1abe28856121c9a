"""`shoal chat`: talk to a model in the terminal, or down a pipe.

    a line sends · \\ at its end goes on · \"\"\" opens and closes several lines
    Ctrl-C stops the answer · Ctrl-D leaves · /help lists the rest

stdout carries the answers alone, so that a pipe gets nothing else. Knows nothing of where
the answers come from (`talk.py`).
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli.terminal import open_model, printable
from shoal.core.errors import ConfigError, RequestError, ShoalError
from shoal.core.request import SamplingParams
from shoal.core.whole_file import write_whole

if TYPE_CHECKING:
    from shoal.cli.talk import Message, Talker

_HELP = """\
/system TEXT  tell the model who to be (nothing: forget it)
/reset        forget the conversation
/save FILE    write the conversation as JSON
/exit         leave (so does Ctrl-D)
Several lines: end a line with \\, or put them between \"\"\" and \"\"\"."""


def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=f"As for serve; {options.DEFAULT_MODEL}."),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Talk to a running server instead.")
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Of that server.")] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="Tell the model who to be.")
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.DType = "auto",
    quantize: options.Quantize = "auto",
    kv_cache_dtype: options.KVCacheDType = "auto",
    kernels: options.Kernels = "auto",
    device: options.Device = "auto",
    plan: options.Plan = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    pipeline_parallel_size: options.PipelineParallelSize = 1,
    kv_split: options.KVSplit = "heads",
    max_model_len: options.MaxModelLen = None,
    num_threads: options.NumThreads = None,
    chat_template: options.ChatTemplate = None,
    revision: options.Revision = None,
    hf_token: options.HfToken = None,
    config: options.Config = None,
) -> None:
    """Talk to a model in the terminal."""
    del config
    from shoal.cli.talk import LocalTalker, RemoteTalker

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    talker: Talker
    if url is not None:
        talker = RemoteTalker(url, model=model, api_key=api_key)
    else:
        file, name = options.plan_and_model(plan, model)
        llm = open_model(
            name,
            revision,
            hf_token,
            dtype=dtype,
            quantize=quantize,
            kv_cache_dtype=kv_cache_dtype,
            kernels=kernels,
            device=device,
            plan=file,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            kv_split=kv_split,
            max_model_len=max_model_len,
            num_threads=num_threads,
            chat_template=options.template_text(chat_template),
        )
        talker = LocalTalker(llm, name)
    with closing(talker):
        _converse(talker, Conversation(system), params)


@dataclass(slots=True)
class Conversation:
    """A system prompt and the turns so far; `question` is the one being answered."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, question: str | None = None) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages


def _converse(talker: Talker, conversation: Conversation, params: SamplingParams) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        _enable_line_editing()
        _say(f"{talker.name}; /help lists commands, Ctrl-D leaves")
    while True:
        try:
            text = _read_message(interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            _say("\n(Ctrl-D leaves)")
            continue
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"what came through stdin is no text ({error}); give UTF-8") from None
        if text.strip() == "/exit":
            return
        try:
            if text.startswith("/"):
                _obey(text, conversation)
            elif text.strip():
                _ask(talker, conversation, text, params)
        except ShoalError as error:
            if not interactive:
                raise
            _say(f"error: {error}")


def _ask(talker: Talker, conversation: Conversation, question: str, params: SamplingParams) -> None:
    """Answer, dropping the oldest turns until the conversation fits the context."""
    num_turns = len(conversation.turns)
    answer = None
    while answer is None:
        try:
            answer = _show_answer(talker, conversation.messages(question), params)
        except RequestError as error:
            if error.code != "context_length_exceeded" or not conversation.turns:
                raise
            del conversation.turns[0]
    if num_dropped := num_turns - len(conversation.turns):
        _say(f"(the context is full: the oldest {num_dropped} turns were dropped)")
    conversation.turns.append((question, answer))


def _show_answer(talker: Talker, messages: list[Message], params: SamplingParams) -> str:
    """Stream one answer to stdout; Ctrl-C ends it and keeps what came."""
    texts: list[str] = []
    num_tokens, first_s, finish = 0, None, None
    started_s = time.monotonic()
    on_terminal = sys.stdout.isatty()
    pieces = talker.answer(messages, params)
    try:
        for piece in pieces:
            if first_s is None:
                first_s = time.monotonic()
            num_tokens += piece.num_tokens
            finish = piece.finish_reason or finish
            texts.append(piece.text)
            print(printable(piece.text) if on_terminal else piece.text, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        finish = "interrupted"
    finally:
        pieces.close()
    print(flush=True)
    _say(_speed(num_tokens, started_s, first_s, time.monotonic(), finish))
    return "".join(texts)


def _speed(
    num_tokens: int, started_s: float, first_s: float | None, ended_s: float, finish: str | None
) -> str:
    ttft_s = (first_s or ended_s) - started_s
    decode_s = ended_s - started_s - ttft_s
    parts = [f"{num_tokens} tokens"] if num_tokens else []
    if num_tokens > 1 and decode_s > 0:
        parts.append(f"{(num_tokens - 1) / decode_s:.1f} tokens/s")
    parts.append(f"first after {ttft_s:.2f} s")
    if finish not in (None, "stop"):
        parts.append("cut at its length limit" if finish == "length" else str(finish))
    return f"[{', '.join(parts)}]"


def _obey(text: str, conversation: Conversation) -> None:
    command, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    match command:
        case "/help":
            _say(_HELP)
        case "/reset":
            conversation.turns.clear()
            _say("(forgotten)")
        case "/system":
            conversation.system = rest or None
            _say("(system prompt set)" if rest else "(system prompt removed)")
        case "/save" if rest:
            _save(Path(rest), conversation)
        case "/save":
            _say("give a file: /save FILE")
        case _:
            _say(f"there is no {command}; /help lists commands")


def _save(path: Path, conversation: Conversation) -> None:
    text = json.dumps(conversation.messages(), indent=2, ensure_ascii=False)
    try:
        write_whole(path.expanduser(), text + "\n")
    except OSError as error:
        _say(f"cannot write {path}: {error.strerror}")
    except (RuntimeError, UnicodeError) as error:  # ~nobody; what the terminal sent is no text
        _say(f"cannot write {path}: {error}")
    else:
        _say(f"(saved to {path})")


def _read_message(interactive: bool) -> str:
    """One message, of one line or several.

    Raises:
        EOFError: nothing more will come.
    """
    line = input("> " if interactive else "")
    continued = ". " if interactive else ""
    if line.startswith('"""'):
        text = line.removeprefix('"""')
        while not text.rstrip().endswith('"""'):
            text += "\n" + input(continued)
        return text.rstrip().removesuffix('"""').strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(continued)
    return line


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 — importing it gives input() history and editing
    except ImportError:
        return  # some builds of Python come without it; input() works all the same


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
