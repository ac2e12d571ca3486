"""The listening socket, and connections on which nothing happens.

Three kinds of peer hold a connection without using it: one that never finishes its request's head, one that doesn't read its
answer, and one whose machine or cable is gone. The first is ended by `PatientProtocol`; the other two by the kernel, which
is told here how long data may stay unacknowledged (TCP_USER_TIMEOUT covers a closed window as well) and to ask silent peers
whether they are still there.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minfer.errors import ConfigError
from minfer.server.options import ServerOptions

BACKLOG = 2048


class PatientProtocol(H11Protocol):  # type: ignore[misc]
    """uvicorn's protocol on h11, which bounds a head's size; this adds how long a head may take.

    h11 rather than httptools also where that is installed: httptools has no bound on headers.
    """

    def __init__(self, *arguments: Any, read_seconds: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.read_seconds = read_seconds
        self.head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(error)

    def _time_head(self) -> None:
        """Their state is IDLE until a head is complete, and again once its request has been answered."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(self.read_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None


def protocol(options: ServerOptions) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes for each connection."""
    return functools.partial(PatientProtocol, read_seconds=options.read_seconds)


def bind(options: ServerOptions) -> socket.socket:
    """The listening socket. Raises ConfigError in one sentence for an address that can't be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"host {options.host!r} is not an address of this machine: {error.strerror}") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_dead_peers(listener, options.read_seconds)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        where = f"port {options.port} on {options.host}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{where} is in use; stop the program that has it, or choose another --port") from error
        raise ConfigError(f"{where} can't be used: {error}") from error
    return listener


def _notice_dead_peers(listener: socket.socket, seconds: float) -> None:
    """Connections inherit this from the socket that accepts them. What a system doesn't know is left as it is."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    whole = max(1, round(seconds))
    values = {"TCP_KEEPIDLE": whole, "TCP_KEEPINTVL": max(1, whole // 4), "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": whole * 1000}
    for name, value in values.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tls_settings(options: ServerOptions) -> dict[str, str]:
    """uvicorn's settings for HTTPS, none without a certificate. Raises ConfigError if the pair can't be used."""
    if options.tls_cert is None or options.tls_key is None:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"tls_cert {options.tls_cert} and tls_key {options.tls_key} are not a usable pair of PEM files: {error}"
        ) from error
    return {"ssl_certfile": options.tls_cert, "ssl_keyfile": options.tls_key}
