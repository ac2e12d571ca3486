"""`minfer serve` as a process of its own, and what can be seen of it from outside: memory, health, gauges."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY = re.compile(r"minfer serves .* at (http://\S+)/v1")
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class Served:
    def __init__(self, url: str, process: subprocess.Popen[bytes] | None) -> None:
        self.url = url
        self.process = process

    def rss_bytes(self) -> int | None:
        """Resident memory; None of a server that somebody else started, and where there is no /proc."""
        if self.process is None:
            return None
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"^VmRSS:\s+(\d+) kB", text, flags=re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def cpu_seconds(self) -> float | None:
        """What the process has used so far, of all its threads."""
        if self.process is None:
            return None
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / 100

    def health(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self._get("/health"))
        return values

    def gauges(self) -> dict[str, float]:
        text = self._get("/metrics")
        found = {name: re.search(rf"^\w+:{name}(?:{{.*}})? (\S+)$", text, flags=re.MULTILINE) for name in GAUGES}
        return {name: float(match[1]) for name, match in found.items() if match}

    def wait_until_idle(self, seconds: float = 30) -> dict[str, float]:
        """The gauges once nothing runs or waits any more, or as they still are when the time is over."""
        deadline = time.monotonic() + seconds
        while any((gauges := self.gauges()).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return gauges

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())


@contextmanager
def served(model: str, flags: Sequence[str] = ()) -> Iterator[Served]:
    """A server on a free port, ended by SIGTERM; SystemExit if it doesn't come up or doesn't exit 0."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "minfer", "serve", model, "--port", "0", *flags], stderr=log)
        try:
            yield Served(_url(process, log), process)
        finally:
            process.terminate()
            code = process.wait(120)
    if code != 0:
        raise SystemExit(f"the server ended with exit code {code}")


def _url(process: subprocess.Popen[bytes], log: Any) -> str:
    while True:
        log.seek(0)
        said = log.read().decode(errors="replace")
        found = READY.search(said)
        if found:
            return found[1]
        if process.poll() is not None:
            raise SystemExit(f"the server did not start: {said.strip()}")
        time.sleep(0.1)
