"""Prometheus metrics: what requests went through, and what every replica says of itself.

Named like vLLM's with the prefix `shoal_`, less the label `model_name` (a server has one
model); times in seconds, `shoal_kv_cache_usage_perc` in [0, 1] as there. Each
`ServingMetrics` has its own registry. Knows nothing of HTTP, engines or text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from shoal.core.stats import EngineStats, EntranceStats, HedgeStats, Prospect, ReplicaView

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2, 5, 20)
_REQUEST_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800, 1600)
_TOKENS = tuple(2**power for power in range(18))

Reading = Callable[[EngineStats], float]
_GAUGES: tuple[tuple[str, str, Reading], ...] = (
    ("num_requests_running", "Sequences being computed", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences in the queue", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 1 is full", lambda s: _kv_usage(s)),
)
_COUNTERS: tuple[tuple[str, str, Reading], ...] = (
    ("prompt_tokens", "Prompt tokens, found cached or computed", lambda s: s.prompt_tokens),
    ("prefix_cache_hits", "Prompt tokens whose KV was found cached", lambda s: s.cached_tokens),
    ("generation_tokens", "Output tokens", lambda s: s.output_tokens),
    ("num_preemptions", "Sequences preempted for want of KV", lambda s: s.preemptions),
    ("route_moves", "Sequences that went on on another route", lambda s: s.route_moves),
    ("copied_tokens", "Tokens whose KV went along with them", lambda s: s.copied_tokens),
    ("engine_steps", "Steps run", lambda s: s.computed.steps),
    ("computed_prompt_tokens", "Prompt tokens in Steps", lambda s: s.computed.prompt_tokens),
    ("engine_busy_seconds", "Seconds the workers computed", lambda s: s.busy_s),
)


Expecting = Callable[[Prospect], float]
_EXPECTED: tuple[tuple[str, str, Expecting], ...] = (
    ("router_prompt_slowness", "Times as long as predicted that prompts take", lambda p: p.prompts),
    ("router_decode_slowness", "The same of all other work", lambda p: p.decoding),
    ("router_request_share", "Share of new requests that go there", lambda p: p.share),
    (
        "router_predicted_ttft_seconds",
        "Predicted TTFT of a request like most, were it sent there now",
        lambda p: p.ttft_s,
    ),
)

Counting = Callable[[HedgeStats], int]
_HEDGES: tuple[tuple[str, str, Counting], ...] = (
    ("made", "Second attempts, as a token was late", lambda h: h.hedged),
    ("unpaid", "Those that were not made, as they would have cost too much", lambda h: h.unpaid),
    ("rescues", "Second attempts, as a replica was silent", lambda h: h.rescued),
    ("won", "Second attempts that said the next token first", lambda h: h.won),
    ("retries", "Requests that went elsewhere after a replica failed at them", lambda h: h.retried),
    ("doubts", "Times that a replica was silent for too long", lambda h: h.doubted),
    ("computed_tokens", "Tokens that requests needed", lambda h: h.computed_tokens),
    ("extra_tokens", "Tokens computed besides, as tokens were late", lambda h: h.extra_tokens),
    ("rescued_tokens", "The same, as replicas were silent", lambda h: h.rescued_tokens),
)


class ServingMetrics:
    """Counters and histograms of requests, and a view on the replicas' statistics."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self._http = Counter(
            "shoal_http_requests",
            "HTTP responses by endpoint and status (499: the client hung up first)",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._finished = Counter(
            "shoal_requests_finished",
            "Completions by reason: stop, length, cancelled, or an error's code",
            ("finished_reason",),
            registry=self._registry,
        )
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds", "Submission to first token", _TTFT_S
        )
        self.itl_s = self._histogram(
            "inter_token_latency_seconds", "Gap between tokens as the server sees them", _TOKEN_S
        )
        self.tpot_s = self._histogram(
            "request_time_per_output_token_seconds", "Mean gap between tokens", _TOKEN_S
        )
        self.e2e_s = self._histogram(
            "e2e_request_latency_seconds", "Submission to last token", _REQUEST_S
        )
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a completion", _TOKENS
        )
        self.output_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of a completion", _TOKENS
        )

    def watch_replicas(self, replica_stats: Callable[[], Mapping[str, EngineStats]]) -> None:
        """From now on every scrape asks for the replicas' statistics, by replica name."""
        self._registry.register(_ReplicaCollector(replica_stats))

    def watch_router(self, replicas: Callable[[], Mapping[str, ReplicaView]]) -> None:
        """The same, for what the router expects of them."""
        self._registry.register(_ProspectCollector(replicas))

    def watch_hedges(self, hedges: Callable[[], HedgeStats]) -> None:
        """The same, for second attempts."""
        self._registry.register(_HedgeCollector(hedges))

    def watch_entrance(self, entrance: Callable[[], EntranceStats]) -> None:
        """The same, for requests that have no replica yet."""
        self._registry.register(_EntranceCollector(entrance))

    def http_response(self, endpoint: str, status: int) -> None:
        self._counter_of(self._http, endpoint, str(status)).inc()

    def completion(self, num_prompt_tokens: int, now: float) -> CompletionTimer:
        """A completion was submitted."""
        self.prompt_tokens.observe(num_prompt_tokens)
        return CompletionTimer(self, now)

    def finished(self, reason: str) -> None:
        self._counter_of(self._finished, reason).inc()

    def render(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> _Histogram:
        found = _Histogram(f"shoal_{name}", text, bounds)
        self._registry.register(found)
        return found

    def _counter_of(self, family: Counter, *labels: str) -> Counter:
        """`family.labels(...)`, which takes a lock and spells them anew each time."""
        key = family, labels
        found = self._counters.get(key)
        if found is None:
            found = self._counters[key] = family.labels(*labels)
        return found


class CompletionTimer:
    """The life of one completion, from submission on; ends in exactly one `finished`."""

    __slots__ = ("_first_s", "_last_s", "_metrics", "_num_at_once", "_num_tokens", "_start_s")

    def __init__(self, metrics: ServingMetrics, now: float) -> None:
        self._metrics = metrics
        self._start_s = now
        self._first_s = now
        self._last_s = now
        self._num_tokens = self._num_at_once = 0

    def tokens(self, num_tokens: int, now: float) -> None:
        """`num_tokens` arrived together."""
        if self._num_tokens == 0:
            self._first_s = now
            self._metrics.ttft_s.observe(now - self._start_s)
        else:
            self._metrics.itl_s.observe((now - self._last_s) / num_tokens)
        self._last_s = now
        self._num_tokens += num_tokens

    def answered(self, num_tokens: int) -> None:
        """With so many that came as a whole: when each was made, nobody knows."""
        self._num_at_once = num_tokens

    def finished(self, reason: str, now: float) -> None:
        metrics = self._metrics
        metrics.finished(reason)
        metrics.output_tokens.observe(self._num_tokens + self._num_at_once)
        if self._num_tokens > 1:
            metrics.tpot_s.observe((self._last_s - self._first_s) / (self._num_tokens - 1))
        if reason in ("stop", "length"):
            metrics.e2e_s.observe(now - self._start_s)


class _Histogram(Collector):
    """A histogram for what is observed from one thread, at every token and with every request.

    prometheus_client's own takes a lock and a look at every bound each time: a fifth of what
    streaming a token costs.
    """

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), buckets, self._sum)
        yield family


class _ReplicaCollector(Collector):
    """Reads the replicas at scrape time: nothing to update between scrapes."""

    def __init__(self, replica_stats: Callable[[], Mapping[str, EngineStats]]) -> None:
        self._replica_stats = replica_stats

    def collect(self) -> Iterable[Metric]:
        stats = self._replica_stats()
        kinds = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))
        for family, readings in kinds:
            for name, text, read in readings:
                metric = family(f"shoal_{name}", text, labels=("replica",))
                for replica, now in stats.items():
                    metric.add_metric((replica,), read(now))
                yield metric


class _ProspectCollector(Collector):
    """The same for those that are alive."""

    def __init__(self, replicas: Callable[[], Mapping[str, ReplicaView]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        views = self._replicas()
        for name, text, read in _EXPECTED:
            metric = GaugeMetricFamily(f"shoal_{name}", text, labels=("replica",))
            for replica, view in views.items():
                if view.prospect is not None:
                    metric.add_metric((replica,), read(view.prospect))
            yield metric
        text = "1 of a replica that has been slow for so long that another plan would carry more"
        metric = GaugeMetricFamily("shoal_replan_needed", text, labels=("replica",))
        for replica, view in views.items():
            metric.add_metric((replica,), float(view.lag is not None))
        yield metric
        text = "Requests that were sent to a replica, second attempts too"
        counter = CounterMetricFamily("shoal_router_sent", text, labels=("replica",))
        for replica, view in views.items():
            counter.add_metric((replica,), view.num_sent)
        yield counter


class _HedgeCollector(Collector):
    """The same for the router."""

    def __init__(self, hedges: Callable[[], HedgeStats]) -> None:
        self._hedges = hedges

    def collect(self) -> Iterable[Metric]:
        for name, text, read in _HEDGES:
            yield CounterMetricFamily(f"shoal_hedge_{name}", text, value=read(self._hedges()))


class _EntranceCollector(Collector):
    """The same for who waits before the router."""

    def __init__(self, entrance: Callable[[], EntranceStats]) -> None:
        self._entrance = entrance

    def collect(self) -> Iterable[Metric]:
        now = self._entrance()
        text = "Requests that wait for a replica."
        yield GaugeMetricFamily("shoal_router_waiting", text, value=now.num_waiting)
        text = "Requests refused, as they would have waited too long or too many did."
        yield CounterMetricFamily("shoal_router_refused", text, value=now.num_refused)
        text = "Requests that shared the computation of another one."
        yield CounterMetricFamily("shoal_router_collapsed", text, value=now.num_collapsed)


def _kv_usage(stats: EngineStats) -> float:
    return stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
