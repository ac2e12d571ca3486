"""The OpenAPI document says what the server does: its answers are those that come."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest

from minfer import AsyncLLM

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def test_no_answer_is_a_422(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (path, method)
            assert ("400" in operation["responses"]) == (method == "post")
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("post", COMPLETE, {"json": {"prompt": 5}}),
    ("post", COMPLETE, {"json": {"prompt": "a", "model": "another"}}),
    ("post", COMPLETE, {"data": {"prompt": "a"}}),
    ("post", COMPLETE, {"content": b"x" * (9 << 20), "headers": {"content-type": "application/json"}}),
    ("get", "/v1/models", {"headers": {"origin": "https://evil.example"}}),
    ("get", "/version", {"headers": {"x": "y" * 33000}}),
]


@pytest.mark.parametrize(("method", "path", "sent"), REFUSED)
def test_refusals_are_as_described(client: httpx.Client, document: dict[str, Any], method: str, path: str, sent: dict[str, Any]) -> None:
    response = client.request(method, path, **sent)
    described = document["paths"][path][method]["responses"][str(response.status_code)]
    schema = described["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), {**schema, "components": document["components"]})


def test_streams_and_keys_are_told(serve: Any, llm: AsyncLLM, document: dict[str, Any]) -> None:
    for path in (CHAT, COMPLETE):
        assert set(document["paths"][path]["post"]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "securitySchemes" not in document["components"], "nobody is asked for one"
    with serve(llm, api_key="k") as client:
        keyed = client.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    assert keyed["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert "401" in keyed["paths"][COMPLETE]["post"]["responses"]
    assert "security" not in keyed["paths"]["/health"]["get"]
