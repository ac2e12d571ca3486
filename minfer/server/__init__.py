"""`minfer serve`: the engine behind OpenAI's HTTP API.

options.py      ServerOptions: what a user can set, from which the flags are made
run.py          serve(): socket, loading in the background, signals, draining; startup.py: the first screen
sockets.py      the listening socket, connections on which nothing happens, TLS
app.py          create_app(): the routes; errors.py: OpenAI's error bodies
front.py        what a request passes before them: middleware.py (API key, sizes), keys.py, origins.py (browsers),
                admission.py (the queue, the rate of a key)
records.py      what becomes of each request, told to log.py (a line), metrics.py (a count) and tracing.py (a span for OpenTelemetry)
openapi.py      the document at /openapi.json, made true
registry.py     the note from which `minfer ps` knows this server
slot.py         ModelSlot: where the model is, or will be
protocol.py     request bodies; structured.py: the form of the output in its many spellings
job.py          a checked request; generation.py: a job in the engine, its outputs and usage
tools.py        the tools of a chat: told to the model, enforced by a grammar; tool_calls.py: read back from what it says
chat.py completions.py logprobs.py   the two endpoints and their response shapes; embeddings.py: a third
metrics.py      /metrics, for Prometheus; tokenize.py: the tokenizer over HTTP
sse.py connection.py                 event streams, and clients that leave
page/                                the page at /: a chat, and a live view of the engine

Everything but `options` and this file needs the extra `server`.
"""

from __future__ import annotations

import importlib.util

from minfer.config import EngineConfig
from minfer.errors import ConfigError
from minfer.server.options import ServerOptions

__all__ = ["ServerOptions", "serve"]


def serve(config: EngineConfig, options: ServerOptions) -> None:
    """Serves one model until SIGINT or SIGTERM, then lets running requests finish and returns.

    Raises ConfigError if the address can't be used or the extra isn't installed, whatever loading the model raises, and
    EngineDeadError if the engine fails while serving.
    """
    missing = [name for name in ("fastapi", "uvicorn", "pydantic", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'the server needs {", ".join(missing)}; install it with: pip install "minfer[server]"')
    from minfer.server.run import run_server

    run_server(config, options)
