"""Spans of requests for an OpenTelemetry collector: where the time of one request went, beside those of the services around it.

A request that is over becomes a span, inside the caller's if it sent W3C trace context (`traceparent`), with its phases as spans
inside: queue, prefill, decode. Names are OpenTelemetry's conventions for HTTP and generative AI, and vLLM's for the latencies.
Nothing is measured for it: all of it is read from the `RequestRecord`. Prompts and answers are not sent.

The SDK sends in a thread of its own, drops spans when its queue is full, and takes further settings from OTEL_* variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import minfer
from minfer.errors import ConfigError
from minfer.server.records import GenerationRecord, Listener, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


@contextmanager
def request_spans(endpoint: str | None, model: str) -> Iterator[Sequence[Listener]]:
    """The listener that sends spans to the OTLP endpoint, none without one. What is still unsent at the end is sent then.

    Raises ConfigError where the SDK isn't installed.
    """
    if endpoint is None:
        yield ()
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError('otlp_traces_endpoint needs OpenTelemetry; install it with: pip install "minfer[otel]"') from error
    # Resource.create: OTEL_SERVICE_NAME has the last word. The provider is ours alone, not the process's.
    provider = TracerProvider(resource=Resource.create({"service.name": "minfer", "service.version": minfer.__version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    try:
        yield (RequestSpans(provider.get_tracer("minfer.server", minfer.__version__), model),)
    finally:
        provider.shutdown()


class RequestSpans:
    """A listener that makes spans of records."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self.tracer = tracer
        self.model = model

    def __call__(self, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        did = record.generation
        if did is None and record.route not in OPERATIONS:
            return  # probes and pages: a collector that scrapes /metrics wouldn't see anything else
        span = self.tracer.start_span(
            f"{record.method} {record.route}",
            TraceContextTextMapPropagator().extract(record.trace_headers),
            SpanKind.SERVER,
            self._attributes(record),
            start_time=record.started_ns,
        )
        if record.status >= 500 or (did is not None and did.ending.startswith("failed")):
            span.set_status(Status(StatusCode.ERROR, None if did is None else did.ending))
        inside = set_span_in_context(span)
        for name, begin, end in _phases(did):
            child = self.tracer.start_span(name, inside, start_time=_nanoseconds(record, begin))
            child.end(_nanoseconds(record, end))
        span.end(_nanoseconds(record, record.ended))

    def _attributes(self, record: RequestRecord) -> dict[str, Any]:
        values: dict[str, Any] = {
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "gen_ai.operation.name": OPERATIONS.get(record.route, record.route),
            "gen_ai.request.model": self.model,
            "minfer.request.id": record.id,
        }
        did = record.generation
        if did is None:
            return values
        values |= {f"gen_ai.request.{name}": value for name, value in did.settings.items()}
        values |= {"gen_ai.response.id": did.id, "gen_ai.response.finish_reasons": did.finish_reasons, "minfer.ending": did.ending}
        values |= {"gen_ai.usage.input_tokens": did.prompt_tokens, "gen_ai.usage.output_tokens": did.output_tokens}
        values |= {"minfer.usage.cached_tokens": did.cached_tokens, "gen_ai.latency.e2e": record.seconds}
        if did.metrics is not None and did.metrics.queue_s is not None:
            values["gen_ai.latency.time_in_queue"] = did.metrics.queue_s
        if did.metrics is not None and did.metrics.time_to_first_token_s is not None:
            values["gen_ai.latency.time_to_first_token"] = did.metrics.time_to_first_token_s
        return values


def _phases(did: GenerationRecord | None) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end) of what the first prompt went through, as far as it got."""
    moments = None if did is None else did.metrics
    if moments is None:
        return
    marks = (moments.arrival_time, moments.first_scheduled_time, moments.first_token_time, moments.last_token_time)
    for name, begin, end in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
        if begin is not None and end is not None and end > begin:
            yield name, begin, end


def _nanoseconds(record: RequestRecord, moment: float) -> int:
    """A moment of the monotonic clock on the one of the wall, which the request's beginning ties together."""
    return record.started_ns + round((moment - record.started) * 1e9)
