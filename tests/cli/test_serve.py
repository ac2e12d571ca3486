from __future__ import annotations

from collections.abc import Callable

import pytest

from minfer.config import EngineConfig
from minfer.errors import EngineDeadError
from minfer.server.options import ServerOptions


def test_flags_reach_the_server(minfer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("minfer.server.serve", lambda config, options: seen.extend((config, options)))
    flags = ["--port", 9, "--host", "::1", "--api-key", "k", "--served-model-name", "n", "--max-body-bytes", "1M", "--block-size", 32]
    ran = minfer("serve", "m", *flags, "--seed", 3)
    assert ran.code == 0, ran.err
    assert seen == [
        EngineConfig(model="m", block_size=32, seed=3),
        ServerOptions(port=9, host="::1", api_key="k", served_model_name="n", max_body_bytes=1 << 20),
    ]


def test_a_server_that_fails_is_one_sentence(minfer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(config: EngineConfig, options: ServerOptions) -> None:
        raise EngineDeadError("the engine stopped")

    monkeypatch.setattr("minfer.server.serve", die)
    assert (minfer("serve", "m").code, minfer("serve", "m").err) == (1, "error: the engine stopped\n")
    assert minfer("serve", "m", "--port", 70000).code == 2


def test_the_key_is_not_shown(minfer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minfer.server.serve", lambda config, options: None)
    ran = minfer("serve", "m", "--api-key", "hunter2", "-vv", "--json")
    assert "hunter2" not in ran.out + ran.err
