"""Clients that leave. Whoever closes the connection, in whatever phase, must stop costing anything.

An ASGI application isn't told: it has to read from `receive`, which, once the body is in, returns when the client is gone.
So a second task does that beside the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

CLIENT_CLOSED_REQUEST = 499  # nginx's number, for the log: nobody is there to read it

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientGone, and cancels `work`, if the client leaves before it is done."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await cancel(task, watcher)


async def answer_while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes; if nobody waits for it any more, one that says so in the request's record."""
    try:
        return await while_connected(request.receive, work)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancels what still runs, and waits until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
