"""`python -m minfer.cli.settings_page > docs/settings.md`: the page of all settings, made from the fields that define them."""

from __future__ import annotations

from minfer.cli.options import config_table
from minfer.config import EngineConfig
from minfer.server.options import ServerOptions

INTRO = """# Settings

Every field of `EngineConfig` is a keyword of `LLM(...)` and a flag of every command that loads a model; every field of `ServerOptions` is a
flag of `minfer serve`. This page is made from those fields: `python -m minfer.cli.settings_page > docs/settings.md`.
"""


def page() -> str:
    return f"{INTRO}\n## The engine\n\n{config_table(EngineConfig).strip()}\n\n## The server\n\n{config_table(ServerOptions).strip()}\n"


if __name__ == "__main__":
    print(page(), end="")
