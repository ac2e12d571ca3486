"""Request ids, the API key and the body limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from minfer import AsyncLLM
from minfer.config import ConfigError
from minfer.server import ServerOptions
from minfer.server.keys import ApiKeys
from minfer.server.startup import exposure_warning

COMPLETE = "/v1/completions"


def test_request_ids(client: Any) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/nope", headers={"x-request-id": "abc-2"}).headers["x-request-id"] == "abc-2"
    stream = client.post(COMPLETE, json={"prompt": "a", "max_tokens": 1, "stream": True}, headers={"x-request-id": "abc-3"})
    assert stream.headers["x-request-id"] == "abc-3"
    for unsafe in ("a" * 129, "a b", b"\x1b[31m", ""):
        given = client.get("/health", headers={"x-request-id": unsafe}).headers["x-request-id"]
        assert len(given) == 32, "a new one"


def test_two_requests_may_have_the_same_id(client: Any) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "ignore_eos": True}
    for _ in range(2):
        assert client.post(COMPLETE, json=body, headers={"x-request-id": "same"}).status_code == 200


def test_api_key(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm, api_key="s3cret") as client:
        assert client.get("/health").status_code == 200
        host = str(client.base_url).rstrip("/")  # httpx takes //health alone for a host's name
        for path in ("/v1/models", "/openapi.json", "/nope", "/health/", "//health", "//", "/static/", "/v1/../health/x"):
            for header in (None, "Bearer wrong", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret", "Bearer", "Bearer s\xe9cret"):
                headers = {} if header is None else {"authorization": header.encode("latin-1")}
                response = client.get(host + path, headers=headers)
                assert response.status_code == 401, (path, header)
                assert response.json()["error"]["type"] == "authentication_error"
                assert response.headers["x-request-id"]
        assert client.post(COMPLETE, json={"prompt": "a"}).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
        body = {"prompt": "a", "max_tokens": 1}
        assert client.post(COMPLETE, json=body, headers={"authorization": "bearer s3cret"}).status_code == 200


def test_body_limit(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm, max_body_bytes=1000) as client:
        small = b'{"prompt": "a", "max_tokens": 1, "pad": "%s"}'
        headers = {"content-type": "application/json"}

        def pieces(content: bytes) -> Iterator[bytes]:
            for start in range(0, len(content), 300):
                yield content[start : start + 300]

        fits, large = small % (b"x" * 900), small % (b"x" * 2000)
        assert client.post(COMPLETE, content=fits, headers=headers).status_code == 200
        assert client.post(COMPLETE, content=pieces(fits), headers=headers).status_code == 200
        for content in (large, pieces(large)):
            response = client.post(COMPLETE, content=content, headers=headers)
            assert response.status_code == 413, response.text
            assert response.json()["error"]["code"] == "request_too_large"


def test_options_are_checked_and_the_key_is_not_printed() -> None:
    for bad in ({"port": 70000}, {"api_key": ""}, {"api_key": "a\nb"}, {"drain_seconds": -1}, {"max_body_bytes": 0}, {"ping_seconds": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ServerOptions(**bad)  # type: ignore[arg-type]
    assert "s3cret" not in repr(ServerOptions(api_key="s3cret"))


def test_warning_when_others_can_connect() -> None:
    assert exposure_warning(ServerOptions(), ApiKeys([])) is None
    assert exposure_warning(ServerOptions(host="::1"), ApiKeys([])) is None
    assert exposure_warning(ServerOptions(host="0.0.0.0"), ApiKeys(["k"])) is None
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.org"):
        assert "WARNING" in str(exposure_warning(ServerOptions(host=host), ApiKeys([])))
