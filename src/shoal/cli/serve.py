"""`shoal serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import typer

from shoal.cli import options, router_options
from shoal.cli.route import route
from shoal.core.errors import ConfigError

MAX_WAITING = 256
"""For each replica."""


def serve(
    model: options.OptionalModel = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    api_key: options.ApiKey = None,
    served_model_name: options.ServedModelName = None,
    data_parallel_size: options.DataParallelSize = 1,
    drain_timeout: options.DrainTimeout = 30.0,
    request_timeout: options.RequestTimeout = None,
    chat_template: options.ChatTemplate = None,
    record: options.Record = None,
    router_policy: router_options.RouterPolicy = "predicted",
    hedging: router_options.Hedging = True,
    collapse: router_options.Collapse = True,
    slo: router_options.RouterSlo = None,
    upstream: router_options.Upstream = None,
    upstream_key: router_options.UpstreamKey = None,
    dtype: options.DType = "auto",
    quantize: options.Quantize = "auto",
    kv_cache_dtype: options.KVCacheDType = "auto",
    kernels: options.Kernels = "auto",
    device: options.Device = "auto",
    plan: options.Plan = None,
    cluster: options.Cluster = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    pipeline_parallel_size: options.PipelineParallelSize = 1,
    kv_split: options.KVSplit = "heads",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    batching: options.Batching = "even",
    tpot_target: options.TpotTarget = None,
    max_waiting: options.MaxWaiting = None,
    kv_cache_memory_bytes: options.KvCacheMemoryBytes = None,
    weights_memory_bytes: options.WeightsMemoryBytes = None,
    enable_prefix_caching: options.EnablePrefixCaching = True,
    num_threads: options.NumThreads = None,
    activation_format: options.ActivationFormat = "auto",
    expert_redeal: options.ExpertRedeal = True,
    revision: options.Revision = None,
    hf_token: options.HfToken = None,
    config: options.Config = None,
) -> None:
    """Serve a model over the OpenAI API."""
    del config
    from shoal.cli.http_server import bind
    from shoal.cli.own_plan import own_plan
    from shoal.cli.serving import (
        ServeSettings,
        cluster_here,
        plan_hosts,
        plan_replicas,
        run,
        start_engines,
    )
    from shoal.cli.terminal import find_model
    from shoal.core.latency import Slo
    from shoal.core.options import MAX_NUM_SEQS, EngineOptions
    from shoal.plan_file import Parallelism
    from shoal.policy.routing import policy_named

    if upstream:
        if model is not None or plan is not None:
            raise ConfigError(
                "--upstream stands beside a model to be served here; serve that on a port of its "
                "own, and name it as another --upstream"
            )
        return route(
            upstream,
            upstream_key,
            served_model_name,
            host=host,
            port=port,
            api_key=api_key,
            router_policy=router_policy,
            hedging=hedging,
            slo=slo,
            max_waiting=max_waiting,
            drain_timeout=drain_timeout,
            request_timeout=request_timeout,
        )
    policy_named(router_policy)
    bounds = Slo.parse(slo) if slo else None
    template = options.template_text(chat_template)
    file, named = options.plan_and_model(plan, model)
    parallelism = Parallelism(
        file=file,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        kv_split=kv_split,
        data_parallel_size=data_parallel_size,
        device=device,
        num_threads=num_threads,
        hosts_are_apart=cluster_here() is not None,
    )
    keys = tuple(api_key or ())
    with contextlib.closing(bind(host, port, keys)) as sock:
        found = find_model(named, revision, hf_token)
        engine = EngineOptions(
            model_path=str(found.path),
            fingerprint=found.fingerprint,
            device=device,
            dtype=dtype,
            quantize=quantize,
            kv_cache_dtype=kv_cache_dtype,
            kernels=kernels,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs or (file and file.max_num_seqs) or MAX_NUM_SEQS,
            max_num_batched_tokens=max_num_batched_tokens,
            batching=batching,
            tpot_target_s=tpot_target or (bounds.tpot_s if bounds is not None else None),
            max_waiting=max_waiting or MAX_WAITING,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            weights_memory_bytes=weights_memory_bytes,
            enable_prefix_caching=enable_prefix_caching,
            num_threads=num_threads,
            activation_format=activation_format,
            expert_redeal=expert_redeal,
        )
        if cluster is not None and file is None and not parallelism.is_open:
            raise ConfigError(
                "--cluster stands beside flags that say what runs where; remove it, or them"
            )
        if parallelism.is_open:
            parallelism = replace(parallelism, file=own_plan(found.path, engine, cluster))
        replicas = plan_replicas(parallelism, found.path)
        settings = ServeSettings(
            engine=engine,
            served_model_names=tuple(served_model_name or (found.name,)),
            host=host,
            api_keys=keys,
            replicas=replicas,
            hosts=plan_hosts(replicas, named),
            drain_timeout_s=drain_timeout,
            request_timeout_s=request_timeout,
            chat_template=template,
            record=recording_folder(record),
            router_policy=router_policy,
            hedging=hedging,
            collapse=collapse,
            slo=bounds,
            cluster=cluster,
        )
        raise typer.Exit(run(settings, sock, start_engines(settings)))


def recording_folder(path: Path | None) -> Path | None:
    """It is there from now on.

    Raises:
        ConfigError: it cannot be made.
    """
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--record {path} cannot be made: {error.strerror}; choose another folder"
            ) from error
    return path
