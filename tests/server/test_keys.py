"""Where API keys come from, and that any of them opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minfer import AsyncLLM
from minfer.errors import ConfigError
from minfer.server import ServerOptions
from minfer.server.keys import ApiKeys, load_keys


def test_keys_of_all_three_sources(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfrom-file\n  padded  \n")
    options = ServerOptions(api_key=("flag", "flag-2"), api_key_file=str(file))
    keys = load_keys(options, {"MINFER_API_KEY": "env-1, env-2"})
    names = [keys.name_of(key) for key in ("flag", "flag-2", "env-1", "env-2", "from-file", "padded")]
    assert sorted(map(str, names)) == [f"key-{n}" for n in range(1, 7)]
    assert [keys.name_of(key) for key in ("", "Flag", "flag ", "# ours", "flag\udcff")] == [None] * 5


def test_no_keys() -> None:
    assert not load_keys(ServerOptions(), {})
    assert not ApiKeys([])


@pytest.mark.parametrize(
    ("content", "environment", "said"),
    [
        (None, {}, "can't be read"),
        (b"", {}, "holds no key"),
        (b"# only this\n", {}, "holds no key"),
        (b"\xff\xfe", {}, "can't be read"),
        ("schlüssel".encode(), {}, "ASCII"),
        (b"good", {"MINFER_API_KEY": ""}, "MINFER_API_KEY"),
        (b"good", {"MINFER_API_KEY": "a,,b"}, "MINFER_API_KEY"),
    ],
)
def test_what_looks_locked_is_never_left_open(tmp_path: Path, content: bytes | None, environment: dict[str, str], said: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_keys(ServerOptions(api_key_file=str(file)), environment)


def test_several_keys_over_http(serve: Any, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFER_API_KEY", "third")
    with serve(llm, api_key=("first", "second")) as client:
        for key, status in (("first", 200), ("second", 200), ("third", 200), ("fourth", 401), ("first,second", 401)):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status
