# SPDX-License-Identifier: Apache-2.0
"""What the server counts, in Prometheus' text format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ktx_jax.server.hosted import Hosted

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
disable_created_metrics()  # a second series for each, of when it began
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SPEEDS = (0.5, 1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 200)


class Metrics:
    """The counters of one server; those of the engine are read when asked for."""

    def __init__(self, hosted: Hosted):
        self.registry = CollectorRegistry()
        of = self.registry
        self.requests = Counter(
            "ktx_requests", "Requests answered, by route and status.", ("route", "status"), registry=of
        )
        self.prompt_tokens = Counter("ktx_prompt_tokens", "Tokens of prompts taken.", registry=of)
        self.generated_tokens = Counter("ktx_generated_tokens", "Tokens generated.", registry=of)
        self.finished = Counter("ktx_replies", "Replies, by why they ended.", ("reason",), registry=of)
        first = "From the request to a reply's first token."
        self.first_token = Histogram("ktx_time_to_first_token_seconds", first, buckets=_SECONDS, registry=of)
        speed = "Of each reply, after its first token."
        self.speed = Histogram("ktx_tokens_per_second", speed, buckets=_SPEEDS, registry=of)
        self.registry.register(_Engine(hosted))  # type: ignore[arg-type]  only `collect` is asked of it

    def text(self) -> bytes:
        """All of it, for `/metrics`."""
        return generate_latest(self.registry)


class _Engine:
    """Reads the engine's own figures when metrics are asked for."""

    def __init__(self, hosted: Hosted):
        self._hosted = hosted

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("ktx_ready", "1 when requests are taken.", float(self._hosted.state == "ready"))
        if self._hosted.loaded is None:
            return
        stats = self._hosted.loaded.engine.stats()
        gauges = {
            "ktx_queue_requests": ("Requests that wait to run.", stats.waiting),
            "ktx_batch_requests": ("Requests that run now.", stats.running),
            "ktx_batch_limit": ("Requests that can run at once.", stats.batch),
            "ktx_pages": ("Pages of the cache.", stats.pages_total),
            "ktx_pages_free": ("Pages that a new request may take.", stats.pages_free),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value)
        counters = {
            "ktx_prefix_queried_tokens": ("Tokens of prompts looked up in the prefix cache.", stats.prompt_tokens),
            "ktx_prefix_hit_tokens": ("Tokens of prompts that the prefix cache spared.", stats.cached_tokens),
            "ktx_preemptions": ("Times that a request gave its pages to an older one.", stats.preemptions),
        }
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value)
