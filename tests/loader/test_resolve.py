from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minfer.errors import ModelLoadError
from minfer.loader import hub, list_offline_models, names, open_checkpoint, resolve, resolve_model, resolve_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and an endpoint that refuses connections, whatever this machine has."""
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        unused = s.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused}")
    return cache


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    import huggingface_hub.constants

    def use(endpoint: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")

    return use


def cache_snapshot(cache: Path, repo: str, source: Path) -> Path:
    """What a download leaves behind: refs/main names the commit whose snapshot folder holds the files."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots").mkdir()
    (root / "snapshots" / COMMIT).symlink_to(source, target_is_directory=True)
    return root / "snapshots" / COMMIT


@pytest.fixture
def saved(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_local_folders_and_files(saved: Path, gguf_shaped: Callable[..., Path], tmp_path: Path) -> None:
    assert resolve_model(str(saved)).kind == "folder"
    file = gguf_shaped()
    source = resolve_model(str(file))
    assert (source.kind, source.path, source.name) == ("gguf", file, "model")
    (tmp_path / "g").mkdir()
    file.rename(tmp_path / "g" / "model.gguf")
    assert resolve_model(str(tmp_path / "g")).path == tmp_path / "g" / "model.gguf"
    assert resolve_model(str(saved), load_format="dummy").kind == "dummy"
    (tmp_path / "g" / "model.gguf").rename(saved / "q-00001-of-00002.gguf")
    (saved / "q-00002-of-00002.gguf").touch()
    assert resolve_model(str(saved)).kind == "folder"
    assert resolve_model(str(saved), load_format="gguf").path == saved / "q-00001-of-00002.gguf"
    (saved / "other.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"several GGUF models; give the path of one: other.gguf, q-00001"):
        resolve_model(str(saved), load_format="gguf")


@pytest.mark.parametrize(
    ("make", "load_format", "words"),
    [
        ("empty/", "auto", "neither config.json nor a .gguf"),
        ("empty/", "gguf", "has no .gguf file"),
        ("x.bin", "auto", "not a .gguf file"),
        ("x.gguf", "safetensors", "load_format is 'safetensors'"),
    ],
)
def test_local_things_that_are_no_model(tmp_path: Path, make: str, load_format: Any, words: str) -> None:
    path = tmp_path / make
    path.mkdir() if make.endswith("/") else path.touch()
    with pytest.raises(ModelLoadError, match=words):
        resolve_model(str(path), load_format=load_format)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nonsense",
        "./missing",
        "missing.gguf",
        "/no/such/path",
        "../a/b",
        "a/../b",
        "a/..",
        "..",
        "a/b/c",
        "-x/y",
        "a/b:../c.gguf",
        "a/b:/c.gguf",
        "a/b:c.bin",
        "a--b/c",
        "a/b\n",
        "a\0b",
        "x" * 5000,
        "~nobody-at-all/model",
        "org/model.gguf",
        "smollm2-135m-exl2",
    ],
)
def test_names_that_mean_nothing_never_reach_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    monkeypatch.setattr(resolve, "_from_hub", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(ModelLoadError):
        resolve_model(name)


def test_revisions_belong_to_the_hub(saved: Path) -> None:
    for name, load_format in ((str(saved), "auto"), ("llama2-7b", "dummy")):
        with pytest.raises(ModelLoadError, match="revision 'main' means nothing"):
            resolve_model(name, revision="main", load_format=load_format)


@pytest.mark.parametrize("revision", ["../x", "/x", "a b", "", "x/../y"])
def test_revisions_are_checked(revision: str) -> None:
    with pytest.raises(ModelLoadError, match="revision"):
        resolve_model("org/name", revision=revision)
    with pytest.raises(ModelLoadError, match="revision"):
        resolve_tokenizer("smollm2-360m", revision=revision)


def test_offline_says_what_was_tried_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(
        ModelLoadError, match=r"'org/name' is not on this machine \(not in the hub cache\) and the hub can't be reached .*give a local"
    ):
        resolve_model("org/name")
    with pytest.raises(ModelLoadError, match=r"Qwen/Qwen2.5-7B-Instruct-AWQ"):
        resolve_model("qwen2.5-7b-awq")
    assert time.monotonic() - start < 10


def test_the_offline_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/name")


def test_a_hub_that_never_answers(use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()  # accepts connections, says nothing
        use_hub(f"http://127.0.0.1:{s.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelLoadError, match="can't be reached"):
            resolve_model("org/name")
        assert time.monotonic() - start < 5


def test_without_the_hub_client(monkeypatch: pytest.MonkeyPatch, smollm2: Path) -> None:
    for name in [n for n in sys.modules if n == "huggingface_hub" or n.startswith("huggingface_hub.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match=r'pip install "minfer\[hub\]"'):
        resolve_model("org/name")
    assert resolve_model("smollm2-135m").path == smollm2
    assert [m.name for m in list_offline_models()] == ["smollm2-135m"]


def test_a_short_name_takes_the_cache_then_the_package(no_hub: Path, saved: Path, smollm2: Path) -> None:
    assert resolve_model("smollm2-135m").path == smollm2
    folder = cache_snapshot(no_hub, "HuggingFaceTB/SmolLM2-135M-Instruct", saved)
    assert resolve_model("smollm2-135m").path == folder
    assert resolve_model("smollm2-135m", load_format="gguf").path == smollm2
    assert resolve_model("smollm2-135m", load_format="safetensors").path == folder
    (saved / "model.safetensors").unlink()
    assert resolve_model("smollm2-135m").path == smollm2


def test_cached_repositories_need_no_network(no_hub: Path, saved: Path, gguf_shaped: Callable[..., Path], tmp_path: Path) -> None:
    folder = cache_snapshot(no_hub, "org/name", saved)
    source = resolve_model("org/name")
    assert (source.kind, source.name, source.path) == ("folder", "org/name", folder)
    assert dict(open_checkpoint(source).tensors())
    (tmp_path / "g").mkdir()
    gguf_shaped().rename(tmp_path / "g" / "a.gguf")
    ggufs = cache_snapshot(no_hub, "org/quantised", tmp_path / "g")
    assert resolve_model("org/quantised").path == ggufs / "a.gguf"
    assert resolve_model("org/quantised:a.gguf").path == ggufs / "a.gguf"
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "bert" / "model.safetensors").touch()
    cache_snapshot(no_hub, "org/bert", tmp_path / "bert")
    offline = {m.name: m for m in list_offline_models()}
    assert "org/bert" not in offline
    assert offline["org/name"].location == folder
    assert offline["org/name"].size_bytes == sum(f.stat().st_size for f in saved.iterdir())
    assert offline["org/quantised:a.gguf"].format == "gguf"
    assert all(resolve_model(name).path is not None for name in offline)


def test_an_unfinished_download_says_what_is_missing(no_hub: Path, tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    shard.unlink()
    cache_snapshot(no_hub, "org/name", tmp_path / "m")
    with pytest.raises(ModelLoadError, match=f"its copy in the hub cache lacks {shard.name}.*can't be reached"):
        resolve_model("org/name")
    assert "org/name" not in [m.name for m in list_offline_models()]


def test_a_download_takes_only_what_is_needed(serve: Callable[..., Any], use_hub: Callable[[str], None], saved: Path) -> None:
    files = {f.name: f.read_bytes() for f in saved.iterdir()}
    unwanted = {
        "pytorch_model.bin": b"x",
        "consolidated.safetensors": b"x",
        "README.md": b"x",
        "original/model.safetensors": b"x",
        "a.gguf": b"x",
    }
    wanted = {"tokenizer.model": b"model", "chat_template.jinja": b"template", **files}
    with serve({"org/name": {**wanted, **unwanted}}) as (endpoint, fetched):
        use_hub(endpoint)
        source = resolve_model("org/name")
        assert sorted(fetched) == sorted(wanted)
        assert {f.name for f in source.path.iterdir()} == wanted.keys()
        assert dict(open_checkpoint(source).tensors())
    fetched.clear()
    assert resolve_model("org/name").path == source.path  # the server is gone
    assert not fetched


def test_of_several_layouts_one_is_fetched() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    small = ["config.json", "model.safetensors.index.json"]
    assert hub.choose_files([*small, *shards, "consolidated.safetensors", "sub/x.json", "x.msgpack"]) == [*small, *shards]
    assert hub.choose_files([*small, *shards], weights=False) == small


def test_gguf_files_from_the_hub(serve: Callable[..., Any], use_hub: Callable[[str], None], gguf_shaped: Callable[..., Path]) -> None:
    data = gguf_shaped().read_bytes()
    files = {"m-Q8.gguf": data, "big/b-00001-of-00002.gguf": b"1", "big/b-00002-of-00002.gguf": b"2", "README.md": b""}
    with serve({"org/g": files, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b""}}) as (endpoint, fetched):
        use_hub(endpoint)
        assert open_checkpoint(resolve_model("org/g:m-Q8.gguf")).format == "gguf"
        assert fetched == ["m-Q8.gguf"]
        assert resolve_model("org/g:big/b-00001-of-00002.gguf").path.name == "b-00001-of-00002.gguf"
        assert sorted(fetched) == ["big/b-00001-of-00002.gguf", "big/b-00002-of-00002.gguf", "m-Q8.gguf"]
        with pytest.raises(ModelLoadError, match=r"has no file 'none.gguf'; its GGUF files: m-Q8.gguf, big/"):
            resolve_model("org/g:none.gguf")
        with pytest.raises(ModelLoadError, match=r"only pickled weights, which minfer never loads"):
            resolve_model("org/pickled")
        with pytest.raises(ModelLoadError, match=r"the hub has no model 'org/none'"):
            resolve_model("org/none")


def test_a_gguf_repository_asks_which_file(serve: Callable[..., Any], use_hub: Callable[[str], None]) -> None:
    with serve({"org/g": {"a.gguf": b"", "b-00001-of-00002.gguf": b"", "b-00002-of-00002.gguf": b""}}) as (endpoint, _):
        use_hub(endpoint)
        with pytest.raises(ModelLoadError, match=r"name one of them: org/g:a.gguf, org/g:b-00001-of-00002.gguf$"):
            resolve_model("org/g")


def test_dummy_and_tokenizer_fetch_no_weights(serve: Callable[..., Any], use_hub: Callable[[str], None], saved: Path) -> None:
    files = {f.name: f.read_bytes() for f in saved.iterdir()} | {"tokenizer.json": b"{}"}
    with serve({"org/name": files}) as (endpoint, fetched):
        use_hub(endpoint)
        source = resolve_model("org/name", load_format="dummy")
        assert source.kind == "dummy"
        assert "model.safetensors" not in fetched
        assert resolve_tokenizer("org/name") == source.path
        assert "model.safetensors" not in fetched


def test_tokenizers_by_path(tmp_path: Path, gguf_shaped: Callable[..., Path], smollm2: Path) -> None:
    (tmp_path / "t").mkdir()
    file = tmp_path / "t" / "tokenizer.json"
    file.touch()
    with pytest.raises(ModelLoadError, match="is a file; give the folder"):
        resolve_tokenizer(str(file))
    assert resolve_tokenizer(str(file.parent)) == file.parent
    for name in (str(gguf_shaped()), "smollm2-135m"):
        found = resolve_tokenizer(name)
        assert not isinstance(found, Path)
        assert "tokenizer.ggml.tokens" in found
    with pytest.raises(ModelLoadError):
        resolve_tokenizer(str(tmp_path / "none"))


@pytest.mark.parametrize("name", list(names.KNOWN))
def test_every_short_name_has_a_shape_transformers_agrees_with(name: str) -> None:
    """The parameter count of the published model, by transformers' own arithmetic on the same config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_model(name, load_format="dummy")
    config = dict(source.config)
    kind = {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "MixtralForCausalLM": "mixtral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen2MoeForCausalLM": "qwen2_moe",
        "Qwen3MoeForCausalLM": "qwen3_moe",
    }[config["architectures"][0]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    from minfer.model_config import ModelConfig

    assert ModelConfig.from_hf(config).num_parameters == sum(p.numel() for p in model.parameters())
    published = {  # millions, from the model cards
        "smollm2-135m": 135, "smollm2-360m": 362, "smollm2-1.7b": 1711, "tinyllama-1.1b": 1100, "llama2-7b": 6738, "llama2-13b": 13016,
        "llama3.1-8b": 8030, "llama3.2-1b": 1236, "llama3.2-3b": 3213, "mistral-7b": 7248, "qwen2.5-0.5b": 494, "qwen2.5-1.5b": 1544,
        "qwen2.5-3b": 3086, "qwen2.5-7b": 7616, "qwen2.5-14b": 14770, "mixtral-8x7b": 46703, "qwen1.5-moe-a2.7b": 14316,
        "qwen3-30b-a3b": 30532,
    }  # fmt: skip
    assert round(ModelConfig.from_hf(config).num_parameters / 1e6) == pytest.approx(published[name], abs=1)


def test_twins_are_names_too() -> None:
    assert names.find("llama3.1-8b-fp8") == (names.KNOWN["llama3.1-8b"], "fp8")
    assert names.find("llama3.1-8b-nf4") is None
    assert all(names.find(name) is not None for name in names.all_names())
    for model in names.KNOWN.values():
        for target in (model.repo, *model.twins.values()):
            repo, _, file = target.partition(":")
            assert resolve.REPO.fullmatch(repo)
            assert not file or resolve.GGUF_FILE.fullmatch(file)
    with pytest.raises(ModelLoadError, match=r"use 'llama3.1-8b'"):
        resolve_model("llama3.1-8b-awq", load_format="dummy")
