"""The load driver tells right endings from wrong ones, and a crowd of all kinds leaves a server as it was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from http_helpers import load, running, wait_until_free

from compare.load.crowd import MALFORMED, STREAMS, Crowd
from compare.load.drive import closed_loop, open_loop
from compare.load.exchange import Ask, Outcome, exchange
from compare.load.server import Served


@contextmanager
def answering(*parts: bytes) -> Iterator[int]:
    """A server that says the same to everybody and closes; its port."""
    ready, ports = threading.Event(), []
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        stop = asyncio.Event()
        loops.append(asyncio.get_running_loop())
        stops.append(stop)
        ready.set()
        await stop.wait()
        server.close()

    stops: list[asyncio.Event] = []
    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    ready.wait(10)
    yield ports[0]
    loops[0].call_soon_threadsafe(stops[0].set)
    thread.join(10)


def ask(*parts: bytes) -> Outcome:
    with answering(*parts) as port:
        return asyncio.run(exchange(Ask("/v1/completions", b"{}"), "127.0.0.1", port))


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "text": "y", "finish_reason": "length"}]}\n\n'
DONE, ERROR = b"data: [DONE]\n\n", b'data: {"error": {"message": "so it is"}}\n\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


END = b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "ending", "tokens"),
    [
        ((HEAD, chunk(TOKEN), chunk(LAST), chunk(DONE) + END), "done", 2),
        ((HEAD + chunk(b": ping\n\n") + chunk(TOKEN)[:10], chunk(TOKEN)[10:] + chunk(LAST + DONE) + END), "done", 2),
        ((HEAD, chunk(TOKEN), chunk(ERROR) + END), "failed", 1),
        ((HEAD, chunk(TOKEN), chunk(LAST)), "broken", 2),
        ((HEAD, chunk(TOKEN), chunk(LAST) + END), "broken", 2),
        ((HEAD, chunk(TOKEN), chunk(DONE) + END), "broken", 1),
        ((HEAD, chunk(LAST), chunk(DONE), chunk(DONE) + END), "broken", 1),
        ((HEAD, chunk(LAST), chunk(DONE), chunk(ERROR) + END), "broken", 1),
        ((HEAD, chunk(LAST), chunk(LAST), chunk(DONE) + END), "broken", 2),
        ((b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}',), "done", 1),
        ((b'HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}',), "broken", 0),
        ((b'HTTP/1.1 429 x\r\ncontent-length: 11\r\n\r\n{"oops": 1}',), "broken", 0),
        ((b'HTTP/1.1 400 x\r\ncontent-length: 26\r\n\r\n{"error":{"message":"no"}}',), "refused", 0),
        ((b'HTTP/1.1 503 x\r\ncontent-length: 26\r\n\r\n{"error":{"message":"no"}}',), "failed", 0),
        ((b"HTTP/1.1 200",), "broken", 0),
        ((), "broken", 0),
    ],
)  # fmt: skip
def test_endings(parts: tuple[bytes, ...], ending: str, tokens: int) -> None:
    outcome = ask(*parts)
    assert (outcome.ending, len(outcome.arrivals)) == (ending, tokens), outcome.why


def test_events_carry_the_time_at_which_they_came() -> None:
    first, last = ask(HEAD, chunk(TOKEN), chunk(LAST), chunk(DONE) + END).arrivals
    assert 0.01 < last - first < 1


def test_nobody_there() -> None:
    with answering() as port:
        pass
    assert asyncio.run(exchange(Ask("/", b""), "127.0.0.1", port)).ending == "unreachable"


def test_a_crowd_is_drawn_from_its_seed() -> None:
    asks = Crowd().asks(2000, 1)
    assert asks == Crowd().asks(2000, 1) != Crowd().asks(2000, 2)
    assert 0.16 < sum(a.leave_after is not None for a in asks) / 2000 < 0.24
    assert 0.03 < sum((a.path, a.body) in MALFORMED for a in asks) / 2000 < 0.08
    assert 0.02 < sum(a.pause_seconds > 0 for a in asks) / 2000 < 0.08


def test_a_crowd_leaves_the_server_as_it_was(tiny_llama: Path) -> None:
    """Each request one ending, every gauge back to 0, no block held: what `python -m compare.load mixed` does for longer."""
    llm = load(tiny_llama, max_num_seqs=16)
    with running(llm, max_queue=1000) as client:
        url = str(client.base_url).rstrip("/")
        crowd = Crowd(prompt_words=(2, 20), output_tokens=(2, 24), pause_seconds=0.2)
        result = closed_loop(url, crowd.asks(300, 3), 60)
        assert not result.broken, result.broken[:3]
        endings = result.summary()["endings"]
        assert endings.keys() == {"done", "refused", "left"}
        assert endings["done"] > 180 and endings["left"] > 30
        wait_until_free(llm)
        assert not any(Served(url, None).wait_until_idle().values())
        assert len(Served(url, None).gauges()) == 3
        health = client.get("/health").json()
        assert (health["running"], health["waiting"]) == (0, 0)
    llm.engine.core.scheduler.check_integrity()
    llm.shutdown()


def test_more_than_there_is_room_for(tiny_llama: Path) -> None:
    """Whoever doesn't fit is told at once and when to come back; the others are served to their end."""
    llm = load(tiny_llama, max_num_seqs=2)
    with running(llm, max_queue=4) as client:
        crowd = Crowd(**{**vars(STREAMS), "prompt_words": (2, 8), "output_tokens": (20, 30)})
        result = open_loop(str(client.base_url).rstrip("/"), crowd.asks(80, 5), rate=2000)
    assert not result.broken, result.broken[:3]
    refused = [o for o in result.outcomes if o.ending == "refused"]
    assert refused and all(o.status == 429 and o.retry_after for o in refused)
    assert sum(o.ending == "done" for o in result.outcomes) == 80 - len(refused) >= 6
    llm.shutdown()


def test_the_page_shows_what_was_measured() -> None:
    from compare.load.docs import PAGE, update

    folder = max((PAGE.parents[1] / "results").glob("load-*"))
    assert PAGE.read_text() == update(folder)
