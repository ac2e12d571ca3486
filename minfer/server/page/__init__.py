"""The page at `/`: a chat, and a live view of the engine for those who want to see how serving works.

static/     what the browser gets: one HTML file, one style sheet, plain ES modules; nothing is built, nothing comes from other hosts
assets.py   serves them, under a policy that lets the page run no other script and talk to no other server
live.py     /v1/engine/state: where the live view gets its numbers
"""

from __future__ import annotations

from minfer.server.page.assets import PAGE_PATHS, add_page
from minfer.server.page.live import add_live_view

__all__ = ["PAGE_PATHS", "add_live_view", "add_page"]
