"""What `make demo` runs: serve SmolLM2-135M, ask it a question through the OpenAI HTTP API, print the streamed answer and its speed.

Everything a client needs is standard library here on purpose: an OpenAI-compatible server is a POST and a stream of lines.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
START_LIMIT_S = 120


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    print(f"$ minfer serve {MODEL} --port {port}", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "minfer", "serve", MODEL, "--port", str(port)])
    try:
        wait_until_healthy(url, server)
        ask(url)
    finally:
        server.terminate()
        code = server.wait(timeout=30)
    print(f"server stopped, exit code {code}")
    sys.exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended at start with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    sys.exit(f"the server was not ready after {START_LIMIT_S} s")


def ask(url: str) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    print(f"\n> {QUESTION}\n", flush=True)
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    started = time.monotonic()
    first = last = None
    usage = {}
    with urllib.request.urlopen(request, timeout=120) as stream:
        for line in stream:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                last = time.monotonic()
                first = first or last
                print(choice["delta"].get("content") or "", end="", flush=True)
    assert first is not None and last is not None, "the answer was empty"
    tokens = usage["completion_tokens"]
    speed = (tokens - 1) / (last - first) if last > first else float("nan")
    print(f"\n\n{usage['prompt_tokens']} prompt tokens, first token after {first - started:.2f} s; {tokens} tokens at {speed:.0f} tokens/s")


if __name__ == "__main__":
    main()
