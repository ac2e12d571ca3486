"""A client that leaves, in any phase, costs nothing any more: its request ends and its blocks are free within a step or two."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from http_helpers import post, slow_down, wait_until_free

from minfer import AsyncLLM

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
# 400 steps of 20 ms: none of these would end by itself while a test waits.
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
STEP = 0.02


def wait_until_busy(llm: AsyncLLM) -> None:
    deadline = time.monotonic() + 10
    while not llm.engine.core.scheduler.pool.num_used:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"prompt": ["a", "b", "c"]}], ids=["one", "n", "prompts"])
def test_leaving_a_stream(serve: Any, own_llm: AsyncLLM, extra: dict[str, Any]) -> None:
    slow_down(own_llm, STEP)
    with serve(own_llm) as client:
        with client.stream("POST", COMPLETE, json={"prompt": "a", **LONG, **extra, "stream": True}) as response:
            lines = response.iter_lines()
            for _ in range(4):
                next(lines)
        wait_until_free(own_llm, 2)
        assert post(client, COMPLETE, prompt="a", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "before the first event"])
def test_leaving_without_an_answer(serve: Any, own_llm: AsyncLLM, path: str, stream: bool) -> None:
    slow_down(own_llm, STEP if not stream else 0.3)
    prompt = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    with serve(own_llm) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json={**prompt, **LONG, "stream": stream}, timeout=0.15)
        wait_until_free(own_llm, 2)


def test_leaving_the_queue(serve: Any, tiny_llama: Any) -> None:
    from http_helpers import load

    llm = load(tiny_llama, max_num_seqs=1)
    slow_down(llm, STEP)
    with serve(llm) as client, client.stream("POST", COMPLETE, json={"prompt": "a", **LONG, "stream": True}) as running:
        next(running.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{client.base_url}{COMPLETE}", json={"prompt": "queued", **LONG}, timeout=0.3)
        deadline = time.monotonic() + 2
        while len(llm.engine.outputs) > 1:
            assert time.monotonic() < deadline, "the queued request is still there"
            time.sleep(0.01)
        assert len(llm.engine.outputs) == 1, "the running one goes on"
    llm.shutdown()


def test_leaving_while_the_prompt_is_tokenised(serve: Any, own_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    tokenize = own_llm.engine.inputs.tokenize

    def slow(prompt: Any) -> Any:
        entered.set()
        leave.wait(10)
        return tokenize(prompt)

    monkeypatch.setattr(own_llm.engine.inputs, "tokenize", slow)
    with serve(own_llm) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(COMPLETE, json={"prompt": "x", **LONG}, timeout=0.3)
        assert entered.is_set()
        time.sleep(0.2)
        leave.set()
        time.sleep(0.3)
        assert not own_llm.engine.has_unfinished_requests
        monkeypatch.undo()
        assert client.get("/health").status_code == 200


def test_a_connection_cut_without_goodbye(serve: Any, own_llm: AsyncLLM) -> None:
    slow_down(own_llm, STEP)
    with serve(own_llm) as client:
        body = b'{"prompt": "a", "max_tokens": 400, "ignore_eos": true, "stream": true}'
        url = client.base_url
        raw = socket.create_connection((url.host, url.port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # close() sends a reset
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        raw.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_until_busy(own_llm)
        raw.close()
        wait_until_free(own_llm, 2)


def test_the_event_loop_answers_while_the_engine_and_the_tokenizer_work(serve: Any, own_llm: AsyncLLM) -> None:
    slow_down(own_llm, 0.5)
    with serve(own_llm) as client:
        worker = threading.Thread(target=post, args=(client, COMPLETE), kwargs={"prompt": "x", "max_tokens": 3, "ignore_eos": True})
        worker.start()
        wait_until_busy(own_llm)
        started = time.monotonic()
        for _ in range(5):
            assert client.get("/health").status_code == 200
        assert time.monotonic() - started < 0.5
        worker.join()


def test_leaving_while_a_grammar_is_compiled(serve: Any, own_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compilation may go on, for others may want it; the request, its place in the queue and its blocks are gone."""
    asked = threading.Event()

    def never(form: Any) -> Future[Any]:
        asked.set()
        return Future()

    with serve(own_llm, max_queue=0) as client:
        with monkeypatch.context() as patch:
            patch.setattr(own_llm.engine.inputs.grammars, "submit", never)
            with pytest.raises(httpx.ReadTimeout):
                client.post(COMPLETE, json={"prompt": "x", "structured_outputs": {"regex": "a+"}, **LONG}, timeout=1)
        assert asked.is_set()
        assert not own_llm.engine.has_unfinished_requests
        assert post(client, COMPLETE, prompt="x", max_tokens=2)["usage"]["completion_tokens"] <= 2
