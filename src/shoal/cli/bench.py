"""`shoal bench URL`: open-loop load on any OpenAI-compatible server, and what came of it.

Reads flags, wires workload, prompts, load and report together; measures nothing itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from shoal.cli import workloads
from shoal.cli.bench_prompts import CHARS_PER_TOKEN, PromptSource, token_id_source, word_source
from shoal.cli.bench_report import render, summarise
from shoal.cli.loadgen import LoadConfig, RequestRecord, first_model, run_load, warm_up
from shoal.cli.open_files import allow_files
from shoal.cli.result_file import write_result
from shoal.cli.stream_transport import StreamTransport
from shoal.core.errors import ConfigError
from shoal.core.latency import parse_slo
from shoal.core.workload import Workload

# A client later than this at sending measures itself as much as the server.
_LAG_WORTH_A_NOTE_S = 0.05


def bench(
    url: Annotated[str, typer.Argument(help="the server, such as http://127.0.0.1:8000")],
    workload: workloads.Trace = None,
    rate: workloads.Rate = None,
    num_requests: workloads.NumRequests = None,
    input_tokens: workloads.InputTokens = None,
    output_tokens: workloads.OutputTokens = None,
    time_scale: workloads.TimeScale = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="requests under way at most; reported if it bites")
    ] = None,
    slo: workloads.SloBounds = None,
    seed: Annotated[int, typer.Option(help="of arrivals and prompts")] = 0,
    model: Annotated[str | None, typer.Option(help="default: the first the server names")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="use /v1/chat/completions")] = False,
    vocab_size: Annotated[
        int | None, typer.Option(min=8, help="send random token ids below this, not words")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="ask for outputs of exactly the wanted length")
    ] = True,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds for one request")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write the JSON report here")
    ] = None,
) -> None:
    """Send requests at their appointed times, whatever comes back, and report latencies."""
    if chat and vocab_size is not None:
        raise ConfigError("--vocab-size is for token-id prompts; --chat takes text: drop one")
    bounds = parse_slo(slo) if slo else {}
    load = workloads.chosen_workload(
        workload,
        rate,
        num_requests=num_requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        rng=Random(seed),
    ).stretched(time_scale)
    config = LoadConfig(
        model=model or "",
        chat=chat,
        ignore_eos=ignore_eos,
        temperature=temperature,
        max_concurrency=max_concurrency,
        timeout_s=timeout,
    )
    allow_files()
    report = asyncio.run(
        measure(
            url,
            config,
            load,
            slo=bounds,
            seed=seed,
            api_key=api_key,
            vocab_size=vocab_size,
        )
    )
    text = json.dumps(report, indent=2)
    if as_json:
        typer.echo(text)
    else:
        Console().print(render(report))
    if output is not None:
        write_result(output, text + "\n", "--output")
    if report["interrupted"]:
        raise typer.Exit(130)
    if not report["requests"]["succeeded"]:
        raise typer.Exit(1)


async def measure(
    url: str,
    config: LoadConfig,
    workload: Workload,
    *,
    slo: Mapping[str, float],
    seed: int = 0,
    api_key: str | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Run a load and return its report; cancelled (Ctrl-C), that of what was got so far.

    An empty `config.model` stands for the first one the server names.

    Raises:
        ConfigError: the server cannot be reached or refuses such requests.
    """
    records: list[RequestRecord] = []
    interrupted = False
    async with _client(url, api_key) as client:
        if not config.model:
            config = replace(config, model=await first_model(client))
        await warm_up(client, config)
        if vocab_size is not None:
            source = token_id_source(vocab_size)
        else:
            source = await word_source(client, config.model, chat=config.chat)
        try:
            await run_load(
                client,
                config,
                workload,
                lambda index, arrival: source.prompt(arrival, f"{seed} {index}"),
                records,
            )
        except asyncio.CancelledError:
            interrupted = True
    summary = summarise(records, num_planned=len(workload.arrivals), slo=slo)
    return {
        "url": url,
        "model": config.model,
        "workload": workload.name,
        "seed": seed,
        "interrupted": interrupted,
        **summary,
        "notes": _notes(summary, config, source, interrupted),
    }


def _notes(
    summary: Mapping[str, Any], config: LoadConfig, source: PromptSource, interrupted: bool
) -> list[str]:
    notes = []
    if interrupted:
        notes.append("interrupted: requests under way are not counted")
    if not source.exact:
        notes.append(
            f"no /tokenize here: prompt lengths are approximate ({CHARS_PER_TOKEN:g} characters "
            f"a token); --vocab-size sends token ids instead"
        )
    if summary["tokens"]["counted_by"] == "pieces":
        notes.append("the server reports no usage: each piece of text counts as one token")
    if delayed := summary["delayed_by_concurrency_limit"]:
        notes.append(
            f"--max-concurrency {config.max_concurrency} held back {delayed} requests; "
            f"their wait is in TTFT and E2E"
        )
    lag = summary["send_lag_s"]
    if lag and not summary["delayed_by_concurrency_limit"] and lag["p99"] > _LAG_WORTH_A_NOTE_S:
        notes.append(
            f"this client sent late (p99 {lag['p99'] * 1000:.0f} ms); it may be the bottleneck"
        )
    return notes


def _client(url: str, api_key: str | None) -> httpx.AsyncClient:
    try:
        base = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL ({error}); give http://HOST:PORT") from error
    return httpx.AsyncClient(
        base_url=str(base).rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        # Each request has its own deadline; nothing here may queue one behind another.
        timeout=httpx.Timeout(None, connect=30.0),
        transport=StreamTransport(),
    )
