"""Flags that make a tiny model quick to load in a test."""

from __future__ import annotations

# One thread, and a cache that is small enough to allocate at once.
TINY = ["--threads", "1", "--kv-cache-memory", "16M", "--dtype", "float32"]
