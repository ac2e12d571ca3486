"""`minfer serve`: the OpenAI-compatible server. Everything about serving is in `minfer/server`; here are its flags."""

from __future__ import annotations

from minfer.cli.command import command
from minfer.cli.options import FlagGroup, engine_flags
from minfer.cli.terminal import Terminal
from minfer.config import EngineConfig
from minfer.server.options import ServerOptions


@command(engine=engine_flags(), server=FlagGroup(ServerOptions, "Server"))
def serve(terminal: Terminal, engine: EngineConfig, server: ServerOptions) -> None:
    """Serve a model over HTTP, as OpenAI's API does."""
    from minfer.server import serve as run_server

    run_server(engine, server)  # says itself what is missing where its extra isn't installed
    if terminal.json:
        terminal.result({"model": engine.model, "stopped": True})
