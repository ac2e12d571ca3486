from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from minfer.cli import doctor as doctor_module
from minfer.server import registry

NOTE = {"model": "m", "device": "cpu", "weights_bytes": 1 << 20, "kv_cache_bytes": 1 << 21, "context": 512}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path))
    return tmp_path


def test_ps_asks_the_servers_that_live(minfer: Callable, cache: Path) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"status": "ok", "running": 2, "waiting": 1, "uptime_seconds": 3700.0}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    assert minfer("ps", "--json").json == {"servers": []}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry.announce({**NOTE, "url": f"http://127.0.0.1:{server.server_port}"})
        (cache / "servers" / f"{gone.pid}.json").write_text(json.dumps({**NOTE, "url": "http://127.0.0.1:1"}))
        (cache / "servers" / "notes.json").write_text("{")
        [found] = minfer("ps", "--json").json["servers"]
        assert (found["pid"], found["running"], found["waiting"], found["status"]) == (os.getpid(), 2, 1, "ok")
        assert "1 h 1 min" in minfer("ps").out
        server.shutdown()
    assert not (cache / "servers" / f"{gone.pid}.json").exists()
    [silent] = minfer("ps", "--json").json["servers"]
    assert silent["status"] == "does not answer"
    registry.withdraw()
    assert "no server is running" in minfer("ps").err


def test_a_cache_that_can_not_be_written_is_no_reason_not_to_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "file"))
    registry.announce(NOTE)
    registry.withdraw()
    assert registry.announced() == []


def test_doctor(minfer: Callable, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = minfer("doctor", "--json")
    assert ran.code == 0
    states = {check["name"]: check["state"] for check in ran.json["checks"]}
    assert states.keys() == doctor_module.CHECKS.keys()
    assert states["torch"] == "ok"
    assert "wrong" not in states.values()

    def broken() -> doctor_module.Finding:
        raise OSError("the disk is on fire")

    monkeypatch.setitem(doctor_module.CHECKS, "disk", broken)
    ran = minfer("doctor")
    assert ran.code == 2
    assert "OSError: the disk is on fire" in ran.out
    assert "1 of 7 checks failed: disk" in ran.err


def test_doctor_notices_kernels_that_compute_wrongly(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minfer.kernels.ops import Ops

    monkeypatch.setattr(Ops, "rms_norm", lambda self, x, weight, eps, residual=None: x)
    state, text = doctor_module.CHECKS["kernels"]()
    assert state == "wrong"
    assert "--backend reference" in text
