"""schemathesis writes requests after the served OpenAPI document, valid and broken ones: no answer is a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from http_helpers import load, post, running, wait_until_free
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from minfer import AsyncLLM

COMPLETE = "/v1/completions"


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[AsyncLLM]:
    """Answers are short here: what is valid is not to cost the time that what is odd needs."""
    llm = load(tiny_llama, max_model_len=24)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def client(llm: AsyncLLM) -> Iterator[httpx.Client]:
    with running(llm, max_request_sequences=8, any_model_name=True) as client:
        yield client


def fuzz(client: httpx.Client, examples: int, derandomize: bool) -> int:
    """Sends up to `examples` valid and as many invalid requests to every operation; returns how many those were."""
    base, session, sent = str(client.base_url), requests.Session(), 0
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    failures: list[str] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and operation.method != "post":
                continue

            @settings(max_examples=examples, deadline=None, derandomize=derandomize, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                nonlocal sent
                sent += 1
                response = case.call(base_url=base, session=session, timeout=60)
                if response.status_code >= 500:
                    failures.append(f"{case.method} {case.formatted_path} {case.body!r}: {response.status_code} {response.text[:300]}")

            send()
    assert not failures, "\n".join(failures[:5])
    return sent


@pytest.mark.filterwarnings("ignore")
def test_no_server_error(client: httpx.Client, llm: AsyncLLM) -> None:
    assert fuzz(client, 8, derandomize=True) > 50
    check_unharmed(client, llm)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_no_server_error_in_thousands(client: httpx.Client, llm: AsyncLLM) -> None:
    assert fuzz(client, 260, derandomize=False) >= 2000
    check_unharmed(client, llm)


def check_unharmed(client: httpx.Client, llm: AsyncLLM) -> None:
    wait_until_free(llm)
    assert llm.is_running
    assert post(client, COMPLETE, prompt="a", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
