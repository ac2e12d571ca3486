"""A server around a tiny random model, shared by all tests that don't harm it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import load, running, wait_until_free
from server_process import Process

from minfer import AsyncLLM


@pytest.fixture(scope="session")
def llm(tiny_llama: Path) -> Iterator[AsyncLLM]:
    llm = load(tiny_llama)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="session")
def client(llm: AsyncLLM) -> Iterator[httpx.Client]:
    with running(llm) as client:
        yield client


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[httpx.Client]]:
    return running


@pytest.fixture
def own_llm(tiny_llama: Path) -> Iterator[AsyncLLM]:
    """An engine of the test's own, to be slowed down or broken."""
    llm = load(tiny_llama)
    yield llm
    llm.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts servers in processes of their own, and leaves none behind."""
    started: list[Process] = []

    def run(*arguments: Any, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield run
    for process in started:
        process.process.kill()
        process.process.wait()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the shared engine, it holds nothing."""
    yield
    if "llm" in request.fixturenames or "client" in request.fixturenames:
        wait_until_free(request.getfixturevalue("llm"))
