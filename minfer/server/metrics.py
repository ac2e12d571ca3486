"""`/metrics`: the engine's counters in Prometheus' text format, under vLLM's names with the prefix `minfer:` (or `vllm:`, so that
boards, alerts and benchmarks made for vLLM work as they are).

Next to nothing is kept here: each scrape reads the scheduler's, the speculation's and `RequestStats`' counters as they stand. So the
engine pays nothing for being watched, gauges can't be left behind by a request that went wrong, and two servers in one process
share no registry. Before the model is loaded, and after the engine has died, what is known of the process is still told.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.responses import Response

from minfer.engine.async_llm import AsyncLLM
from minfer.engine.stats import Histogram, RequestStats
from minfer.server.admission import Admission
from minfer.server.records import RequestRecord
from minfer.server.slot import ModelSlot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # what every Prometheus reads; OpenMetrics forbids vLLM's names
LABELS = ("model_name", "engine")  # vLLM's; there is one engine
STEP_PARTS = ("schedule", "build", "forward", "sample", "wait", "update")


class HttpCounts:
    """A listener that counts requests by method, route and status: a few dozen numbers, whatever is sent."""

    def __init__(self) -> None:
        self.by: Counter[tuple[str, ...]] = Counter()

    def __call__(self, record: RequestRecord) -> None:
        self.by[record.method, record.route, str(record.status)] += 1


def add_metrics_route(app: FastAPI, slot: ModelSlot, prefix: str, admission: Admission, counts: HttpCounts) -> None:
    registry = CollectorRegistry()
    registry.register(ServerCollector(slot, prefix, admission, counts))
    registry.register(EngineCollector(slot, prefix))
    ProcessCollector(registry=registry)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:  # not async: made in a thread, since it takes milliseconds
        return Response(generate_latest(registry), media_type=CONTENT_TYPE)


class _Families(Collector):
    """How metrics are named and labelled. They are made anew at each scrape."""

    def __init__(self, slot: ModelSlot, prefix: str) -> None:
        self.slot = slot
        self.prefix = prefix

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._name(name), help_text, labels=LABELS)
        family.add_metric(self._labels(), value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        """The text format adds `_total` to the name."""
        family = CounterMetricFamily(self._name(name), help_text, labels=LABELS)
        family.add_metric(self._labels(), value)
        return family

    def _counter_by(self, labels: Sequence[str], name: str, help_text: str, values: Mapping[tuple[str, ...], float]) -> Metric:
        """One counter for each combination of values of `labels`."""
        family = CounterMetricFamily(self._name(name), help_text, labels=[*LABELS, *labels])
        for which, value in values.items():
            family.add_metric([*self._labels(), *which], value)
        return family

    def _histogram(self, name: str, help_text: str, histogram: Histogram) -> Metric:
        counts, total = list(histogram.counts), 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*histogram.bounds, float("inf")), counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))
        family = HistogramMetricFamily(self._name(name), help_text, labels=LABELS)
        family.add_metric(self._labels(), buckets, histogram.sum)
        return family

    def _name(self, name: str) -> str:
        return f"{self.prefix}:{name}"

    def _labels(self) -> list[str]:
        return [self.slot.name, "0"]


class ServerCollector(_Families):
    """What the HTTP side counts, from the first moment on."""

    def __init__(self, slot: ModelSlot, prefix: str, admission: Admission, counts: HttpCounts) -> None:
        super().__init__(slot, prefix)
        self.admission = admission
        self.counts = counts

    def collect(self) -> Iterator[Metric]:
        answered = dict(self.counts.by)  # a copy in one step: this is called in a thread
        yield self._counter_by(("method", "handler", "status"), "http_requests", "HTTP requests that are over.", answered)
        yield self._counter_by(("reason",), "requests_refused", "Requests sent away with 429, by why.", _keyed(self.admission.refused))
        yield self._gauge("requests_in_flight", "Sequences that hold a place in the queue, or run.", self.admission.in_flight)


class EngineCollector(_Families):
    def collect(self) -> Iterator[Metric]:
        llm = self.slot.llm
        if llm is None:
            return
        yield from self._gauges(llm)
        yield from self._counters(llm)
        yield from self._lora(llm)
        yield from self._guided(llm)
        yield from self._speculation(llm)
        for name, help_text, histogram in histograms(llm.stats):
            yield self._histogram(name, help_text, histogram)

    def _gauges(self, llm: AsyncLLM) -> Iterator[Metric]:
        scheduler, config = llm.engine.core.scheduler, llm.config
        pool = scheduler.pool
        yield self._gauge("num_requests_running", "Sequences that take part in the engine's steps.", len(scheduler.running))
        yield self._gauge("num_requests_waiting", "Sequences that wait to be admitted.", scheduler.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use, from 0 to 1.", pool.num_used / pool.num_blocks)
        facts = {
            "block_size": config.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.prefix_caching,
            "num_gpu_blocks": pool.num_blocks,  # vLLM's name, whatever the device is
        }
        info = GaugeMetricFamily(self._name("cache_config_info"), "How the KV cache is set up.", labels=[*LABELS, *facts])
        info.add_metric([*self._labels(), *map(str, facts.values())], 1)
        yield info

    def _counters(self, llm: AsyncLLM) -> Iterator[Metric]:
        done, stats, times = llm.engine.core.scheduler.stats, llm.stats, llm.engine.core.times
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", done.num_prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", done.num_prefix_hits)
        yield self._counter("num_preemptions", "Sequences that lost their blocks to others and were put back.", done.num_preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens of the sequences that were begun.", stats.num_prompt_tokens)
        yield self._counter("prompt_tokens_cached", "Prompt tokens whose KV was there already.", stats.num_cached_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.num_output_tokens)
        saved = llm.engine.core.runner.builder.keys_saved
        yield self._counter("shared_prefix_keys_saved", "Keys that a layer's attention read once for a whole step.", saved)
        yield self._counter_by(("finished_reason",), "request_success", "Sequences that ended, by how.", _keyed(stats.ended_by))
        yield self._counter("engine_steps", "Steps of the engine's loop.", times.steps)
        seconds = {part: getattr(times, part) for part in STEP_PARTS}
        yield self._counter_by(("part",), "engine_step_seconds", "Seconds spent in each part of the engine's loop.", _keyed(seconds))

    def _lora(self, llm: AsyncLLM) -> Iterator[Metric]:
        """Where there are adapters. vLLM's gauge has all it says in its labels; its value is the time, so that readers know the latest."""
        names = llm.config.adapters
        if not names:
            return
        scheduler = llm.engine.core.scheduler
        total = scheduler.stats.num_adapter_tokens
        yield self._counter("lora_tokens", "Tokens that went through the model with a LoRA adapter.", total)
        running, waiting = (",".join(names[number - 1] for number in numbers) for numbers in scheduler.adapters())
        facts = {"max_lora": str(len(names)), "running_lora_adapters": running, "waiting_lora_adapters": waiting}
        info = GaugeMetricFamily(self._name("lora_requests_info"), "LoRA adapters of sequences here.", labels=[*LABELS, *facts])
        info.add_metric([*self._labels(), *facts.values()], time.time())
        yield info

    def _guided(self, llm: AsyncLLM) -> Iterator[Metric]:
        """minfer's own: what structured output costs, and what it spares."""
        masks, grammars, forced = llm.engine.grammar_masks, llm.engine.inputs.grammars, llm.engine.core.forced
        yield self._counter("guided_grammars_compiled", "Schemas and grammars that were compiled.", grammars.num_compiled)
        yield self._counter("guided_grammars_reused", "Requests whose grammar was there already.", grammars.num_reused)
        yield self._counter("guided_masks", "Rows of logits that were masked by a grammar.", masks.num_masks)
        yield self._counter("guided_mask_seconds", "Seconds that it took.", masks.seconds)
        stood = 0 if forced is None else forced.stats.num_accepted_tokens
        yield self._counter("guided_forced_tokens", "Tokens that a grammar forced, generated without a step of their own.", stood)

    def _speculation(self, llm: AsyncLLM) -> Iterator[Metric]:
        """Only where tokens are guessed ahead: vLLM's benchmark takes the names' presence for "speculation is on"."""
        if llm.engine.core.speculation is None:
            return
        stats = llm.engine.core.speculation.stats
        yield self._counter("spec_decode_num_drafts", "Steps of a sequence that brought drafts.", stats.num_drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens guessed and checked.", stats.num_draft_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.num_accepted_tokens)
        at = {str(depth): count for depth, count in enumerate(stats.accepted_at)}
        name = "spec_decode_num_accepted_tokens_per_pos"
        yield self._counter_by(("position",), name, "Right guesses by their place in the draft.", _keyed(at))
        yield self._gauge("spec_decode_mean_accepted_length", "Tokens of a step that brought drafts.", stats.mean_accepted_length)
        gained = "Seconds that right guesses saved, less what all guesses cost, at measured prices."
        yield self._gauge("spec_decode_seconds_gained", gained, stats.seconds_gained)


def _keyed(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in values.items()}


def histograms(stats: RequestStats) -> list[tuple[str, str, Histogram]]:
    """(vLLM's name, meaning, values)."""
    return [
        ("time_to_first_token_seconds", "From a request's arrival to its first token.", stats.time_to_first_token),
        ("inter_token_latency_seconds", "From one step of a sequence that brought tokens to the next.", stats.inter_token_latency),
        ("request_time_per_output_token_seconds", "A sequence's mean time per token after the first.", stats.time_per_output_token),
        ("e2e_request_latency_seconds", "From a request's arrival to its end.", stats.e2e_latency),
        ("request_queue_time_seconds", "From a request's arrival to its first step.", stats.queue_time),
        ("request_prefill_time_seconds", "From a sequence's first step to its first token.", stats.prefill_time),
        ("request_decode_time_seconds", "From a sequence's first token to its last.", stats.decode_time),
        ("request_inference_time_seconds", "From a sequence's first step to its last token.", stats.inference_time),
        ("request_prompt_tokens", "Prompt tokens of a sequence.", stats.prompt_length),
        ("request_generation_tokens", "Tokens that a sequence generated.", stats.output_length),
        ("request_params_n", "n of a request.", stats.params_n),
        ("request_params_max_tokens", "max_tokens of a request that set it.", stats.params_max_tokens),
        ("iteration_tokens_total", "Tokens that went through the model in a step.", stats.step_tokens),
    ]
