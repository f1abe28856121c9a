"""`shoal generate`: complete prompts in this process, once.

A model with a chat template gets each prompt as a user's message, since such models answer
better that way; --raw feeds the text as it stands.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.core.errors import ConfigError
from shoal.core.request import SamplingParams

if TYPE_CHECKING:
    from shoal.llm import LLM, Completion


def generate(
    model: options.Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...", help="Texts; - reads one from stdin, as does giving none."
        ),
    ] = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Prompts are messages (default where the model has a chat template), or plain.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Text, token ids and timings as JSON.")
    ] = False,
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
    """Complete prompts once."""
    del config
    from shoal.cli.terminal import open_model

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    texts = _with_stdin(prompts or _piped())
    file, named = options.plan_and_model(plan, model)
    started_s = time.monotonic()
    llm = open_model(
        named,
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
    load_s = time.monotonic() - started_s
    with llm:
        as_chat = llm.has_chat_template if chat is None else chat
        if len(texts) == 1 and not as_json:
            _stream(llm, texts[0], params, as_chat)
            return
        completions = _complete(llm, texts, params, as_chat)
    if as_json:
        results = [_report(*pair) for pair in zip(texts, completions, strict=True)]
        print(json.dumps({"model": model, "load_s": load_s, "results": results}, indent=2))
        return
    for text, completion in zip(texts, completions, strict=True):
        print(f"> {text}\n{_shown(completion.text)}\n")


def _piped() -> list[str]:
    """The one prompt that comes through a pipe."""
    if sys.stdin.isatty():
        raise typer.BadParameter("give one, or pipe it in", param_hint="PROMPT...")
    return ["-"]


def _with_stdin(prompts: list[str]) -> list[str]:
    if prompts.count("-") > 1:
        raise ConfigError("- stands among the prompts twice; stdin can be read once: remove one")
    try:
        texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    except UnicodeDecodeError as error:
        raise ConfigError(f"what came through stdin is no text ({error}); pipe in UTF-8") from error
    if "" in texts:
        raise ConfigError("a prompt is empty; give some text")
    return texts


def _stream(llm: LLM, text: str, params: SamplingParams, as_chat: bool) -> None:
    chunks = (
        llm.stream(messages=_message(text), params=params) if as_chat else llm.stream(text, params)
    )
    for chunk in chunks:
        print(_shown(chunk.text), end="", flush=True)
    print()


def _complete(
    llm: LLM, texts: list[str], params: SamplingParams, as_chat: bool
) -> list[Completion]:
    if as_chat:
        return llm.chat([_message(text) for text in texts], params)
    return llm.generate(texts, params)


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _shown(text: str) -> str:
    from shoal.cli.terminal import printable

    return printable(text) if sys.stdout.isatty() else text


def _report(prompt: str, completion: Completion) -> dict[str, Any]:
    choice = completion.choices[0]
    num_tokens = len(choice.token_ids)
    decode_s = choice.latency_s - choice.ttft_s
    return {
        "prompt": prompt,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "num_prompt_tokens": len(completion.prompt_ids),
        "num_cached_tokens": choice.num_cached_tokens,
        "tokens": num_tokens,
        "token_ids": list(choice.token_ids),
        "ttft_s": choice.ttft_s,
        "tpot_s": decode_s / (num_tokens - 1) if num_tokens > 1 else None,
        "latency_s": choice.latency_s,
    }
