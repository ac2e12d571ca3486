"""One HTTP request on a connection of its own, as cheap as Python allows.

On a machine where clients and server share the cores, whatever a client spends is taken from the server. So nothing is
parsed while bytes arrive: each arrival is a time and a length, and what they were is worked out once all is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

# Every exchange ends in exactly one of these. "broken" is none of the others: no ending, two of them, or bytes after it.
Ending = Literal["done", "refused", "failed", "left", "broken", "unreachable"]


@dataclass
class Ask:
    """What to send and how to behave. `leave_after`: (part of the request to send, arrivals to wait for, seconds to wait)."""

    path: str
    body: bytes
    leave_after: tuple[float, int, float] | None = None
    pause_seconds: float = 0.0  # a slow reader: reads nothing for so long, after its first bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """Times are seconds since the request was sent; `arrivals` are those of token events, `text` is the whole output."""

    ending: Ending
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    why: str = ""
    retry_after: int | None = None


class Exchange(asyncio.Protocol):
    def __init__(self, ask: Ask, host: str) -> None:
        self.ask = ask
        self.host = host
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received = bytearray()
        self.marks: list[tuple[float, int]] = []  # when, and how much had come by then
        self.left = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "TCP"
        self.transport = transport
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.ask.headers.items())
        head = f"POST {self.ask.path} HTTP/1.1\r\nhost: {self.host}\r\nconnection: close\r\ncontent-type: application/json\r\n{extra}"
        request = head.encode() + b"content-length: %d\r\n\r\n" % len(self.ask.body) + self.ask.body
        self.sent_at = time.perf_counter()
        part, arrivals, seconds = self.ask.leave_after or (1.0, -1, 0.0)
        transport.write(request[: int(len(request) * part)])
        if arrivals == 0:
            asyncio.get_running_loop().call_later(seconds, self._leave)

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.marks.append((time.perf_counter(), len(self.received)))
        if self.ask.leave_after is not None and len(self.marks) == self.ask.leave_after[1]:
            self._leave()
        elif self.ask.pause_seconds and len(self.marks) == 1:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(self.ask.pause_seconds, self._go_on)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _leave(self) -> None:
        if not self.transport.is_closing():
            self.left = True
            self.transport.abort()

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def outcome(self) -> Outcome:
        """What it was, from all bytes."""
        if self.left:
            return Outcome("left")
        head, found, rest = bytes(self.received).partition(b"\r\n\r\n")
        if not found:
            return Outcome("broken", why=f"the connection ended after {len(self.received)} bytes, before a head was there")
        lines = head.decode("latin-1").lower().split("\r\n")
        status = int(lines[0].split()[1])
        headers = dict(line.split(": ", 1) for line in lines[1:])
        if headers.get("transfer-encoding") == "chunked":
            return _stream(status, rest, [(at - self.sent_at, size - len(head) - 4) for at, size in self.marks])
        return _whole(status, rest, headers, self.marks[-1][0] - self.sent_at)


async def exchange(ask: Ask, host: str, port: int) -> Outcome:
    """Runs one; a server that can't be reached is an outcome too."""
    try:
        _, protocol = await asyncio.get_running_loop().create_connection(lambda: Exchange(ask, host), host, port)
    except OSError as error:
        return Outcome("unreachable", why=str(error))
    try:
        await protocol.ended
    finally:
        protocol.transport.abort()
    return protocol.outcome()


def _whole(status: int, body: bytes, headers: dict[str, str], at: float) -> Outcome:
    if len(body) != int(headers.get("content-length", -1)):
        return Outcome("broken", status, why="the body is not as long as its head says")
    try:
        answer: dict[str, Any] = json.loads(body)
    except ValueError:
        return Outcome("broken", status, why="the body is no JSON")
    if status == 200:
        return Outcome("done", status, [at])
    if set(answer) != {"error"}:
        return Outcome("broken", status, why="an error without OpenAI's shape")
    retry = int(headers["retry-after"]) if "retry-after" in headers else None
    return Outcome("failed" if status >= 500 else "refused", status, why=str(answer["error"]["message"]), retry_after=retry)


def _stream(status: int, body: bytes, marks: list[tuple[float, int]]) -> Outcome:
    """An event stream in chunked encoding. Each event's time is that of the bytes that completed it."""
    arrivals: list[float] = []
    finished: set[int] = set()
    endings = place = mark = 0
    error = ""
    while True:
        size_end = body.find(b"\r\n", place)
        if size_end < 0:
            return Outcome("broken", status, arrivals, "the stream was cut")
        size = int(body[place:size_end], 16)
        data, place = body[size_end + 2 : size_end + 2 + size], size_end + 2 + size + 2
        if size == 0:
            break
        while mark < len(marks) - 1 and marks[mark][1] < place:
            mark += 1
        for event in data.decode().split("\n\n"):
            if not event or event.startswith(":"):
                continue
            if endings:
                return Outcome("broken", status, arrivals, "an event after the last one")
            if event == "data: [DONE]":
                endings += 1
                continue
            content = json.loads(event.removeprefix("data: "))
            if "error" in content:
                endings, error = endings + 1, content["error"]["message"]
            for choice in content.get("choices", ()):
                arrivals.append(marks[mark][0])
                if choice["finish_reason"] is not None:
                    if choice["index"] in finished:
                        return Outcome("broken", status, arrivals, "a choice finished twice")
                    finished.add(choice["index"])
    if endings != 1 or (not error and not finished):
        return Outcome("broken", status, arrivals, f"{endings} terminal events, {len(finished)} finished choices")
    return Outcome("failed" if error else "done", status, arrivals, error)
