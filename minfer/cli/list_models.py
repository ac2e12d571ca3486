"""`minfer list`: the models that can be served without a network, and the short names that stand for others."""

from __future__ import annotations

from minfer.cli.command import command
from minfer.cli.terminal import Terminal, human_bytes


@command()
def list_models(terminal: Terminal) -> None:
    """List the models on this machine, and the short names of those that can be downloaded."""
    from minfer.loader import list_offline_models
    from minfer.loader.names import KNOWN

    offline = list_offline_models()
    if terminal.json:
        models = [{"name": m.name, "format": m.format, "size_bytes": m.size_bytes, "location": str(m.location)} for m in offline]
        known = {name: {"repo": model.repo, "quantised": dict(model.twins)} for name, model in KNOWN.items()}
        terminal.result({"offline": models, "known": known})
        return
    if offline:
        rows = [(m.name, m.format, human_bytes(m.size_bytes), str(m.location)) for m in offline]
        terminal.table(rows, ("model", "format", "size", "location"), title="On this machine")
    else:
        terminal.note("no models on this machine yet")
    here = {m.name for m in offline}
    rest = [(name, model.repo, " ".join(f"-{twin}" for twin in model.twins)) for name, model in KNOWN.items() if name not in here]
    if rest:
        terminal.table(rest, ("name", "hub repository", "quantised: add to the name"), title="\nDownloaded when first used")
