"""Spans as a collector receives them: decoded by OpenTelemetry's own protobuf classes."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from http_helpers import NAME
from starlette.testclient import TestClient

from minfer import AsyncLLM
from minfer.config import ConfigError
from minfer.server import ServerOptions
from minfer.server.app import create_app
from minfer.server.tracing import request_spans

COMPLETE = "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """(endpoint, the bodies that were posted to it)."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    server.server_close()


def spans(bodies: list[bytes]) -> tuple[list[Any], dict[str, Any]]:
    """(all spans, attributes of the resource)."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    requests = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    resources = [resource for request in requests for resource in request.resource_spans]
    found = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    return found, attributes(resources[0].resource) if resources else {}


def attributes(thing: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in thing.attributes}


def test_a_request_is_a_span_with_its_phases(llm: AsyncLLM, collector: tuple[str, list[bytes]]) -> None:
    endpoint, bodies = collector
    with request_spans(endpoint, NAME) as listeners:
        app = create_app(llm, ServerOptions(served_model_name=NAME), listeners=listeners)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
            body = {"prompt": "The quick", "max_tokens": 6, "ignore_eos": True, "temperature": 0.5}
            assert client.post(COMPLETE, json=body, headers=headers).status_code == 200
            assert client.post(COMPLETE, json={"prompt": 5}).status_code == 400
            assert client.get("/health").status_code == 200
    found, resource = spans(bodies)
    assert resource["service.name"] == "minfer"
    request, refused = (span for span in found if span.name == f"POST {COMPLETE}")
    values = attributes(request)
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT), "a part of the caller's trace"
    assert values["http.response.status_code"] == 200 and values["minfer.request.id"] == "mine"
    assert (values["gen_ai.operation.name"], values["gen_ai.request.model"]) == ("text_completion", NAME)
    assert (values["gen_ai.request.max_tokens"], values["gen_ai.usage.output_tokens"]) == (6, 6)
    assert values["gen_ai.usage.input_tokens"] > 1
    assert 0 < values["gen_ai.latency.time_to_first_token"] < values["gen_ai.latency.e2e"]
    inside = [span for span in found if span.parent_span_id == request.span_id]
    assert [span.name for span in inside] == ["queue", "prefill", "decode"]
    moments = [request.start_time_unix_nano, *(t for s in inside for t in (s.start_time_unix_nano, s.end_time_unix_nano))]
    assert moments == sorted(moments) and moments[-1] <= request.end_time_unix_nano
    assert attributes(refused)["http.response.status_code"] == 400
    assert refused.trace_id != request.trace_id
    assert len(found) == 5, "probes are no spans"
    assert "The quick" not in repr(found), "prompts stay here"


def test_a_collector_that_is_gone_harms_nobody(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with request_spans("http://127.0.0.1:9/v1/traces", NAME) as listeners:
        app = create_app(llm, ServerOptions(served_model_name=NAME), listeners=listeners)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            assert client.post(COMPLETE, json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_without_the_sdk_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"minfer\[otel\]"), request_spans("http://127.0.0.1:9", NAME):
        pass


def test_without_an_endpoint_nothing_is_imported() -> None:
    with request_spans(None, NAME) as listeners:
        assert not listeners


@pytest.mark.parametrize("endpoint", ["", "nonsense", "host:4318", "grpc://host:4317", "http://", "/v1/traces"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be a URL like http://"):
        ServerOptions(otlp_traces_endpoint=endpoint)
