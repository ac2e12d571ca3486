"""`minfer pull`, `rm` and `show` against a hub on this machine: what was sent is what is kept, and what is kept can go again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minfer.cli import main
from minfer.errors import ModelLoadError
from minfer.loader import downloaded, hub


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import huggingface_hub.constants

    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return folder


@pytest.fixture
def hub_of(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`with hub_of(repositories) as fetched:` the hub's client talks to it."""
    import huggingface_hub.constants

    @contextmanager
    def use(repositories: dict[str, dict[str, bytes]], cut: Sequence[str] = ()) -> Any:
        with serve(repositories, cut) as (endpoint, fetched):
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield fetched

    return use


@pytest.fixture
def files(tiny: Callable[..., Any], tmp_path: Path) -> dict[str, bytes]:
    tiny().save_pretrained(tmp_path / "saved")
    return {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_pull_show_rm(cache: Path, hub_of: Any, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    with hub_of({"org/name": {**files, "pytorch_model.bin": b"x"}}) as fetched:
        code, pulled = run(capsys, "pull", "org/name")
        assert code == 0
        assert (pulled["files"], pulled["verified"]) == (len(files), len(files)), "every file has the hash it was sent under"
        assert pulled["size_bytes"] == sum(map(len, files.values()))
        assert sorted(fetched) == sorted(files)
        fetched.clear()
        assert run(capsys, "pull", "org/name")[0] == 0
        assert not fetched
    code, shown = run(capsys, "show", "org/name")
    assert code == 0
    assert (shown["repository"], shown["format"], shown["context"]) == ("org/name", "safetensors", 128)
    assert len(shown["revision"]) == 40
    code, gone = run(capsys, "rm", "org/name", "--yes")
    assert (code, gone["removed"]) == (0, "org/name")
    assert gone["freed_bytes"] >= pulled["size_bytes"]
    assert not list(cache.glob("models--*"))
    code, again = run(capsys, "rm", "org/name", "--yes")
    assert code == 2
    assert "has not been downloaded" in again["error"]["message"]


def test_a_file_that_changed_on_the_way_is_found_and_fetched_again(
    cache: Path, hub_of: Any, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with hub_of({"org/name": files}) as fetched:
        assert run(capsys, "pull", "org/name")[0] == 0
        folder = hub.cached_folder("org/name")
        assert folder is not None
        weights = (folder / "model.safetensors").resolve()
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        code, told = run(capsys, "pull", "org/name")
        assert code == 2
        assert "model.safetensors of org/name did not have the hash" in told["error"]["message"]
        fetched.clear()
        assert run(capsys, "pull", "org/name")[0] == 0
        assert fetched == ["model.safetensors"], "only what was damaged"
        assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_one_gguf_file_of_several(cache: Path, hub_of: Any, gguf_shaped: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = gguf_shaped().read_bytes()
    with hub_of({"org/g": {"a.gguf": data, "b.gguf": data + b"\0"}}):
        for name in ("a", "b"):
            assert run(capsys, "pull", f"org/g:{name}.gguf")[0] == 0
    code, gone = run(capsys, "rm", "org/g:a.gguf", "-y")
    assert (code, gone["freed_bytes"]) == (0, len(data))
    folder = hub.cached_folder("org/g")
    assert folder is not None
    assert [file.name for file in folder.iterdir()] == ["b.gguf"]
    assert (folder / "b.gguf").read_bytes() == data + b"\0"


def test_what_minfer_did_not_download_is_not_touched(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in (str(mine), "/", "..", "nowhere", "org/../name"):
        code, told = run(capsys, "rm", name, "--yes")
        assert code == 2
        assert "not downloaded by minfer" in told["error"]["message"]
    assert mine.is_dir()
    assert "needs --yes" in run(capsys, "rm", "org/name")[1]["error"]["message"]


def test_names(cache: Path) -> None:
    assert downloaded.repository_of("llama2-7b") == ("meta-llama/Llama-2-7b-chat-hf", "")
    assert downloaded.repository_of("llama2-7b-gguf")[1].endswith(".Q4_K_M.gguf")
    with pytest.raises(ModelLoadError):
        downloaded.repository_of("x")


def test_a_broken_connection_is_taken_up_where_it_broke(
    cache: Path, hub_of: Any, files: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB otherwise, more than there is of this model
    half = len(files["model.safetensors"]) // 2
    with hub_of({"org/name": files}, cut=["model.safetensors"]) as fetched:
        code, pulled = run(capsys, "pull", "org/name")
    assert (code, pulled["verified"]) == (0, len(files))
    assert f"model.safetensors from byte {half // 1000 * 1000}" in fetched


def test_show_of_what_is_not_here(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(capsys, "show", "llama2-7b")
    assert code == 2
    assert "minfer pull llama2-7b" in told["error"]["message"]
