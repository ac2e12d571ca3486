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
TINY = "tiny"
# A model that costs next to nothing, so that hours of requests are the server's work; with SmolLM2's vocabulary and chat template.
TINY_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class Served:
    def __init__(self, url: str, process: subprocess.Popen[bytes] | None) -> None:
        self.url = url
        self.process = process

    def resources(self) -> dict[str, int | None]:
        """What the process holds; None of a server that somebody else started, and where there is no /proc."""
        values: dict[str, int | None] = {"rss_bytes": None, "open_files": None, "threads": None}
        if self.process is None:
            return values
        folder = Path(f"/proc/{self.process.pid}")
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            values = {"rss_bytes": int(status["VmRSS"].split()[0]) * 1024, "threads": int(status["Threads"])}
            values["open_files"] = sum(1 for _ in (folder / "fd").iterdir())
        except OSError:
            return dict.fromkeys(values)
        return values

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
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        if model == TINY:
            Path(folder, "config.json").write_text(json.dumps(TINY_SHAPE))
            model, flags = folder, ["--load-format", "dummy", "--tokenizer", "smollm2-135m", "--served-model-name", TINY, *flags]
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
