"""One record for each request: its line in the log, its count in /metrics."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_helpers import load, post, slow_down, wait_until_free
from prometheus_client.parser import text_string_to_metric_families

from minfer import AsyncLLM
from minfer.server.log import JsonFormatter, TextFormatter, log_format
from minfer.server.records import GenerationRecord, RequestRecord

COMPLETE = "/v1/completions"


class Lines(logging.Handler):
    """The log as it is written, formatted where it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))

    def of(self, request_id: str, seconds: float = 5.0) -> list[dict[str, Any]]:
        """The lines of a request, once the one that ends it is there: it is written after the answer."""
        deadline = time.monotonic() + seconds
        while True:
            found = [line for line in map(json.loads, list(self.said)) if line.get("request_id") == request_id]
            if found and "status" in found[-1]:
                return found
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger("minfer"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with log_format("json"):
        yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


def test_a_request_is_one_line_with_its_numbers(client: httpx.Client, lines: Lines) -> None:
    for number, stream in enumerate((False, True)):
        body = {"prompt": "The quick", "max_tokens": 5, "ignore_eos": True, "stream": stream}
        assert client.post(COMPLETE, json=body, headers={"x-request-id": f"id-{number}"}).status_code == 200
        (line,) = lines.of(f"id-{number}")
        assert (line["level"], line["method"], line["path"], line["status"]) == ("INFO", "POST", COMPLETE, 200)
        assert (line["ending"], line["output_tokens"]) == ("done", 5)
        assert line["prompt_tokens"] > 1
        assert 0 < line["first_token_seconds"] <= line["seconds"]
        assert line["queue_seconds"] >= 0
        assert line["answer_id"].startswith("cmpl-")
        assert line["time"].endswith("Z") and len(line["time"]) == 24


def test_what_is_refused_has_its_line_too(serve: Any, llm: AsyncLLM, lines: Lines) -> None:
    with serve(llm, api_key=("one", "two")) as client:
        keyed = {"authorization": "Bearer two", "x-request-id": "a"}
        client.post(COMPLETE, json={"prompt": 5}, headers=keyed)
        client.get("/nowhere?secret=1", headers={**keyed, "x-request-id": "b"})
        client.get("/v1/models", headers={"x-request-id": "c"})
        client.post("/v1/embeddings", json={"input": "a b"}, headers={**keyed, "x-request-id": "d"})
        seen = {name: lines.of(name)[-1] for name in "abcd"}
    assert [seen[name]["status"] for name in "abcd"] == [400, 404, 401, 200]
    assert [seen[name].get("key") for name in "abcd"] == ["key-2", "key-2", None, "key-2"]
    assert seen["b"]["path"] == "/nowhere", "a query may hold secrets"
    assert "ending" not in seen["a"]
    assert (seen["d"]["ending"], seen["d"]["output_tokens"]) == ("done", 0)
    assert "Bearer" not in "".join(lines.said)


def test_a_client_that_leaves(own_llm: AsyncLLM, serve: Any, lines: Lines) -> None:
    slow_down(own_llm, 0.02)
    with serve(own_llm) as client:
        for number, stream in enumerate((False, True)):
            body = json.dumps({"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
                head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nx-request-id: gone-{number}\r\n"
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.2)
            (line,) = lines.of(f"gone-{number}")
            assert line["status"] == (200 if stream else 499)
            assert line["ending"] == "aborted: the client left"
            assert line["output_tokens"] < 400
    wait_until_free(own_llm)


def test_everything_that_is_logged_in_a_requests_course_names_it(client: httpx.Client, lines: Lines) -> None:
    odd = "odd\nINFO forged \x1b[31m"
    client.post(COMPLETE, json={"prompt": "a", "max_tokens": 1, odd: 1}, headers={"x-request-id": "odd-1"})
    warned, ended = lines.of("odd-1")
    assert "unknown request field" in warned["message"] and warned["level"] == "WARNING"
    assert ended["status"] == 200
    assert all(line.isprintable() and line.isascii() for line in lines.said), "one line each, whatever a client sends"


def test_probes_are_not_for_the_usual_log(client: httpx.Client, lines: Lines) -> None:
    client.get("/health", headers={"x-request-id": "probe"})
    client.get("/v1/models", headers={"x-request-id": "after"})
    lines.of("after")
    assert not any(json.loads(line).get("request_id") == "probe" for line in lines.said)


def test_errors_keep_their_traceback_inside_the_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        import sys

        line = logging.LogRecord("minfer.x", logging.ERROR, "", 1, "failed on %s", ("c",), sys.exc_info())
    value = json.loads(JsonFormatter().format(line))
    assert (value["message"], value["level"], value["logger"]) == ("failed on c", "ERROR", "minfer.x")
    assert "ValueError" in value["error"]
    assert "failed on c" in TextFormatter("%(levelname)s %(name)s%(request)s %(message)s").format(line)


def test_the_form_of_the_log_is_given_back() -> None:
    handler, own = logging.StreamHandler(), logging.Formatter("%(message)s")
    handler.setFormatter(own)
    logging.getLogger("minfer").addHandler(handler)
    try:
        with log_format("text"):
            assert isinstance(handler.formatter, TextFormatter)
        assert handler.formatter is own
    finally:
        logging.getLogger("minfer").removeHandler(handler)


def counts(client: httpx.Client, name: str) -> dict[tuple[str, ...], float]:
    """{values of the metric's own labels: value}."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"minfer:{name}"]
    return {tuple(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")): s.value for s in samples}


def test_every_request_is_counted_by_route_and_status(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm) as client:
        for _ in range(3):
            post(client, COMPLETE, prompt="a", max_tokens=1)
        client.post(COMPLETE, json={"prompt": 5})
        for number in range(20):
            client.get(f"/nowhere/{number}")
            client.request(f"ODD{number}", "/v1/models")
        client.get("/v1/models/tiny")
        found = counts(client, "http_requests_total")  # labels in the order of their names: handler, method, status
    assert found[COMPLETE, "POST", "200"] == 3
    assert found[COMPLETE, "POST", "400"] == 1
    assert found["other", "GET", "404"] == 20
    assert found["/v1/models/{name:path}", "GET", "200"] == 1
    assert sum(value for (_, method, _), value in found.items() if method == "other") == 20
    assert len(found) < 8, "made-up paths and methods make no new numbers"


def test_who_is_sent_away_is_counted_by_reason(serve: Any, tiny_llama: Any) -> None:
    llm = load(tiny_llama, max_num_seqs=1)
    slow_down(llm, 0.02)
    with serve(llm, max_queue=0) as client:
        with client.stream("POST", COMPLETE, json={"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}) as running:
            news = running.iter_lines()
            next(news)
            assert counts(client, "requests_in_flight") == {(): 1}
            assert [client.post(COMPLETE, json={"prompt": "b"}).status_code for _ in range(2)] == [429, 429]
        wait_until_free(llm)
        assert counts(client, "requests_refused_total") == {("overloaded",): 2, ("rate_limit_exceeded",): 0}
        assert counts(client, "http_requests_total")[COMPLETE, "POST", "429"] == 2
    llm.shutdown()


def test_a_listener_that_fails_harms_nobody(llm: AsyncLLM) -> None:
    from starlette.testclient import TestClient

    from minfer.server import ServerOptions
    from minfer.server.app import create_app

    seen: list[RequestRecord] = []

    def fails(record: RequestRecord) -> None:
        raise RuntimeError("a bug in a listener")

    app = create_app(llm, ServerOptions(served_model_name="tiny"), listeners=[fails, seen.append])
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models").status_code == 200
    assert [record.route for record in seen] == ["/v1/models"]


def test_facts_leave_out_what_is_not_known() -> None:
    record = RequestRecord("id", "GET", "/x", status=200)
    record.ended = record.started + 1
    assert record.facts() == {"method": "GET", "path": "/x", "status": 200, "seconds": 1.0}
    record.generation = GenerationRecord("cmpl-1", {})
    assert "first_token_seconds" not in record.facts()
