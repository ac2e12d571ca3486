"""Connections on which nothing happens, and HTTPS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import slow_down, wait_until_free

from minfer import AsyncLLM
from minfer.errors import ConfigError
from minfer.server import ServerOptions
from minfer.server.sockets import tls_settings

COMPLETE = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def connect(client: httpx.Client, receive_buffer: int | None = None) -> socket.socket:
    raw = socket.socket()
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(20)
    raw.connect((client.base_url.host, client.base_url.port))
    return raw


@pytest.mark.parametrize("sent", [b"", b"GE", COMPLETE], ids=["nothing", "part of a word", "no end of the head"])
def test_a_head_that_never_ends_is_not_waited_for(serve: Any, llm: AsyncLLM, sent: bytes) -> None:
    with serve(llm, read_seconds=0.3) as client:
        with connect(client) as raw:
            raw.sendall(sent)
            assert ended(raw) == b""
        with connect(client) as raw:  # also after a request that was fine, and one byte at a time
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200 OK" in raw.recv(4096)
            with pytest.raises(OSError):
                drip(raw)


def drip(raw: socket.socket) -> None:
    for _ in range(100):
        raw.sendall(b"G")
        time.sleep(0.05)


def ended(raw: socket.socket) -> bytes:
    """What comes until the server ends the connection, which a reset does as well as a close."""
    received = b""
    try:
        while part := raw.recv(4096):
            received += part
    except ConnectionResetError:
        pass
    return received


def test_a_body_that_never_comes(serve: Any, llm: AsyncLLM) -> None:
    with serve(llm, read_seconds=0.3) as client, connect(client) as raw:
        raw.sendall(COMPLETE + b'content-length: 1000\r\n\r\n{"prompt": ')
        answer = ended(raw)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code": "request_timeout"' in answer


def test_a_stream_that_is_not_read(serve: Any, own_llm: AsyncLLM) -> None:
    """The request of a client that stops reading ends, and takes its blocks with it, while the socket is still open."""
    slow_down(own_llm, 0.002)
    with serve(own_llm, read_seconds=0.5, ping_seconds=0.2) as client, connect(client, receive_buffer=1024) as raw:
        prompts = b",".join([b'"%s"' % (b"word " * 60)] * 30)  # echoed, which fills the buffers between us at once
        body = b'{"prompt": [%s], "n": 20, "max_tokens": 150, "ignore_eos": true, "echo": true, "stream": true}' % prompts
        raw.sendall(COMPLETE + b"content-length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 20
        while not own_llm.engine.has_unfinished_requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        wait_until_free(own_llm, 20)
        assert client.get("/health").status_code == 200


def test_large_heads(client: httpx.Client) -> None:
    many = [(f"x-{n}", "1") for n in range(120)]
    for headers in (many, [("x-large", "a" * 40_000)]):
        response = client.get("/health", headers=headers)
        assert response.status_code == 431
        assert response.json()["error"]["code"] == "headers_too_large"
    assert client.get("/health?" + "q" * 40_000).status_code == 431
    with connect(client) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 200_000)
        assert ended(raw)[:12] in (b"HTTP/1.1 400", b"")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert, *subject]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_tls_pairs_are_checked_before_anything_is_loaded(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    assert tls_settings(ServerOptions()) == {}
    assert tls_settings(ServerOptions(tls_cert=cert, tls_key=key)) == {"ssl_certfile": cert, "ssl_keyfile": key}
    for pair in ((key, cert), (cert, str(tmp_path / "absent")), (__file__, __file__)):
        with pytest.raises(ConfigError, match="not a usable pair"):
            tls_settings(ServerOptions(tls_cert=pair[0], tls_key=pair[1]))
    with pytest.raises(ConfigError, match="need each other"):
        ServerOptions(tls_cert=cert)


def test_https(start: Any, tiny_llama: Path, certificate: tuple[Path, Path]) -> None:
    server = start(tiny_llama, tls_cert=str(certificate[0]), tls_key=str(certificate[1]))
    url = server.wait_for(r"(https://127.0.0.1:\d+)/v1\n")
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    assert httpx.get(f"{url}/health", verify=trusting).json()["status"] == "ok"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
