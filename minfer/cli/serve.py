"""`minfer serve`: the OpenAI-compatible server. Everything about serving is in `minfer/server`; here are its flags."""

from __future__ import annotations

import importlib.util

from minfer.cli.command import command
from minfer.cli.options import FlagGroup, engine_flags
from minfer.cli.terminal import Terminal
from minfer.config import EngineConfig
from minfer.errors import ConfigError
from minfer.server.options import ServerOptions

PACKAGES = ("fastapi", "uvicorn", "pydantic")


@command(engine=engine_flags(), server=FlagGroup(ServerOptions, "Server"))
def serve(terminal: Terminal, engine: EngineConfig, server: ServerOptions) -> None:
    """Serve a model over HTTP, as OpenAI's API does."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'the server needs {", ".join(missing)}, not installed here; install with: pip install "minfer[server]"')
    from minfer.server import serve as run_server

    run_server(engine, server)
    if terminal.json:
        terminal.result({"model": engine.model, "stopped": True})
