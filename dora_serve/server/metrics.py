"""What `/metrics` tells: vLLM's names where they mean the same, and counters per adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dora_serve.onnxruntime.continuous import ContinuousDecoder

if TYPE_CHECKING:
    from .prepare.offer import OfferedModel
    from .registry import Registry

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """Counters of one server; a label `model_name` is always a name that is or was served."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.success = self._counter(
            "vllm:request_success", "Requests that were answered.", "finished_reason"
        )
        self.refused = Counter(
            "dora:request_refused", "Requests with an error.", ["status"], registry=self.registry
        )
        self.adapter_requests = self._counter("dora:adapter_requests", "Requests to an adapter.")
        self.adapter_tokens = self._counter(
            "dora:adapter_generation_tokens", "Tokens generated with an adapter."
        )
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From request to first token.", _SECONDS
        )
        self.between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "From token to token.", _SECONDS
        )
        self.latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "From request to last token.", _SECONDS
        )
        self.prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS
        )
        self.length = self._histogram(
            "vllm:request_generation_tokens", "Tokens of a completion.", _TOKENS
        )

    def _counter(self, name: str, about: str, *more: str) -> Counter:
        return Counter(name, about, ["model_name", *more], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, about, ["model_name"], buckets=buckets, registry=self.registry)

    def asked(self, model: OfferedModel, lengths: Sequence[int]) -> None:
        """A request to `model` with prompts of so many tokens was accepted."""
        self.prompt_tokens.labels(model.name).inc(sum(lengths))
        for length in lengths:
            self.prompt_length.labels(model.name).observe(length)
        if model.adapter is not None:
            self.adapter_requests.labels(model.name).inc()

    def grew(self, model: OfferedModel, tokens: int) -> None:
        """A completion of `model` grew by so many tokens."""
        self.generation_tokens.labels(model.name).inc(tokens)
        if model.adapter is not None:
            self.adapter_tokens.labels(model.name).inc(tokens)

    def answered(self, model: OfferedModel, reason: str, seconds: float) -> None:
        """A completion or batch of `model` ended, so long after its request."""
        self.success.labels(model.name, reason).inc()
        self.latency.labels(model.name).observe(seconds)

    def watch(self, models: Registry) -> None:
        """Tell of the engines' queues, caches and adapters as well."""
        self.registry.register(_Engines(models))


class _Engines:
    def __init__(self, models: Registry) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        label = ["model_name"]
        running = GaugeMetricFamily("vllm:num_requests_running", "Rows in a batch.", labels=label)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Rows that wait.", labels=label)
        loaded = GaugeMetricFamily("dora:adapter_bytes", "Adapters in memory.", labels=label)
        cache = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share filled.", labels=label)
        again = CounterMetricFamily("vllm:num_preemptions", "Rows begun again.", labels=label)
        looked = CounterMetricFamily(
            "vllm:prefix_cache_queries", "Tokens looked for among those kept.", labels=label
        )
        found = CounterMetricFamily(
            "vllm:prefix_cache_hits", "Tokens that were not computed again.", labels=label
        )
        for name, engine in self._models.engines():
            running.add_metric([name], engine.running)
            waiting.add_metric([name], engine.waiting)
            loaded.add_metric([name], engine.pool.bytes)
            if isinstance(engine, ContinuousDecoder):
                cache.add_metric([name], engine.cache_usage)
                again.add_metric([name], engine.preemptions)
                looked.add_metric([name], engine.prefixes.queries)
                found.add_metric([name], engine.prefixes.hits)
        yield from (running, waiting, loaded, cache, again, looked, found)
