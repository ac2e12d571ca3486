"""What pages in a browser may do: nothing, unless they are ours or were allowed."""

from __future__ import annotations

from typing import Any

import pytest

from minfer import AsyncLLM
from minfer.server import ServerOptions
from minfer.server.origins import allowed_hosts, host_name

MODELS = "/v1/models"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LocalHost.", 200),
        ("attacker.example:8000", 400),
        ("127.0.0.1.attacker.example", 400),
        ("localhost@attacker.example", 400),
        ("", 400),
        ("[", 400),
    ],
)
def test_a_rebound_name_gets_nothing(client: Any, host: str, status: int) -> None:
    """DNS rebinding: the attacker's own name, pointed at this machine."""
    response = client.get(MODELS, headers={"host": host})
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["code"] in ("unknown_host", None)


def test_which_hosts() -> None:
    assert allowed_hosts(ServerOptions()) == {"localhost", "127.0.0.1", "::1"}
    assert allowed_hosts(ServerOptions(host="0.0.0.0")) is None
    assert allowed_hosts(ServerOptions(host="0.0.0.0", allowed_host=("api.example",))) == {
        "localhost",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "api.example",
    }
    assert allowed_hosts(ServerOptions(allowed_host=("*",))) is None
    assert host_name("Example.ORG:80") == "example.org"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1.evil.example", "[", "file://"])
def test_scripts_of_other_pages_are_refused(client: Any, origin: str) -> None:
    for method, path in (("GET", MODELS), ("POST", "/v1/completions"), ("OPTIONS", "/v1/completions")):
        response = client.request(method, path, headers={"origin": origin})
        assert response.status_code == 403
        assert "--cors-origin" in response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers


def test_our_own_page_may(client: Any) -> None:
    assert client.get(MODELS, headers={"origin": str(client.base_url).rstrip("/")}).status_code == 200


def test_cors_for_those_who_were_allowed(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm, cors_origin=("https://chat.example",), api_key="k") as client:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        preflight = client.options("/v1/completions", headers={"origin": "https://chat.example", **asks})
        assert preflight.status_code == 200, "a preflight carries no key"
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = client.get(MODELS, headers={"origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example", "or the page could not read why"
        assert client.get(MODELS, headers={"origin": "https://other.example", "authorization": "Bearer k"}).status_code == 403


def test_any_origin(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm, cors_origin="*") as client:
        assert client.get(MODELS, headers={"origin": "https://any.example"}).headers["access-control-allow-origin"] == "*"
