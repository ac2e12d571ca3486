"""`minfer ps`: the servers that run on this machine under this user, and what they are doing now."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from typing import Any

from minfer.cli.command import command
from minfer.cli.terminal import Terminal, human_bytes

TIMEOUT_S = 2.0


@command()
def ps(terminal: Terminal) -> None:
    """List running servers: model, memory, context, requests, uptime."""
    from minfer.server.registry import announced

    servers = [{**note, **_ask(note["url"])} for note in announced()]
    if terminal.json:
        terminal.result({"servers": servers})
        return
    if not servers:
        terminal.note("no server is running; `minfer serve MODEL` starts one")
        return
    header = ("model", "pid", "address", "device", "weights", "KV cache", "context", "running", "waiting", "up")
    terminal.table([_row(server) for server in servers], header)


def _row(server: dict[str, Any]) -> tuple[str, ...]:
    fixed = (server["model"], str(server["pid"]), server["url"], server["device"])
    sizes = (human_bytes(server["weights_bytes"]), human_bytes(server["kv_cache_bytes"]), f"{server['context']:,}")
    if server["status"] != "ok":
        return (*fixed, *sizes, "-", "-", server["status"])
    return (*fixed, *sizes, str(server["running"]), str(server["waiting"]), _duration(server["uptime_seconds"]))


def _ask(url: str) -> dict[str, Any]:
    """What /health says, which needs no key; a server that says no, or nothing, is shown as that."""
    trust_ourselves = ssl._create_unverified_context() if url.startswith("https") else None  # our own process
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT_S, context=trust_ourselves) as response:
            health: dict[str, Any] = json.loads(response.read())
    except urllib.error.HTTPError as error:
        return {"status": _why(error)}
    except (OSError, ValueError):
        return {"status": "does not answer"}
    return {name: health[name] for name in ("status", "running", "waiting", "uptime_seconds")}


def _why(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"answers {error.code}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
