"""The Hugging Face hub through its own client: the local cache first, then a download of just the files that are needed.

A cached copy is used without asking the hub whether there is a newer one: starting must not depend on a network, and `revision`
pins one when that matters. When a file is needed and the hub can't be reached, one short question finds that out, instead of the
client's retries file by file.

Pickled weights are never among the files asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minfer.errors import ModelLoadError

TIMEOUT_S = 10.0  # for the one question that decides whether the hub can be reached
CONFIG_FILES = (".json", ".jinja", "tokenizer.model")


def cached_folder(repo: str, revision: str | None = None) -> Path | None:
    """The cache's snapshot folder of a repository, complete or not, or None. Never touches the network."""
    hub = _hub()
    try:
        # No patterns: the client would otherwise hold a snapshot incomplete that lacks the files we never ask for.
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both the client's and a FileNotFoundError
        return None


def repository_folder(repo: str) -> Path | None:
    """The cache's folder of a repository with all its snapshots, or None."""
    folder = Path(_hub().constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    return folder if folder.is_dir() else None


def missing_weights(folder: Path) -> str | None:
    """Why a snapshot can't be loaded: the name of a file that an interrupted download left out; None when it is whole."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if (folder / "model.safetensors").is_file():
        return None
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None if any(folder.glob("*.safetensors")) else "model.safetensors"
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return next((shard for shard in sorted(shards) if not (folder / shard).is_file()), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return index.name


def repository_files(repo: str, revision: str | None, tried: str) -> list[str]:
    """Names of the files in a repository; `ModelLoadError` in one sentence if the hub can't say. `tried` is what failed before."""
    hub = _hub()
    if hub.constants.HF_HUB_OFFLINE:
        raise ModelLoadError(
            f"{repo!r} is not on this machine ({tried}) and HF_HUB_OFFLINE is set; unset it, or give a local folder or .gguf file"
        )
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
    except Exception as error:  # the client passes on whatever its HTTP library raises, and that library changes between versions
        raise ModelLoadError(_why(repo, revision, tried, error)) from error
    return [sibling.rfilename for sibling in info.siblings or []]


def download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetches the files into the cache, with the client's progress bars, and returns the snapshot folder."""
    hub = _hub()
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(files), etag_timeout=TIMEOUT_S))
    except Exception as error:  # as above
        raise ModelLoadError(f"the download of {repo!r} failed ({_short(error)}); run the same command again to resume it") from error


def choose_files(names: Sequence[str], *, weights: bool = True) -> list[str]:
    """Of a repository's files those that a model needs: config, tokenizer and safetensors, from the top folder only."""
    top = [n for n in names if "/" not in n]
    chosen = [n for n in top if n.endswith(CONFIG_FILES)]
    if not weights:
        return chosen
    tensors = [n for n in top if n.endswith(".safetensors")]
    if "model.safetensors" in tensors:
        return [*chosen, "model.safetensors"]
    return chosen + ([n for n in tensors if n.startswith("model")] or tensors)


def cached_repositories() -> Iterator[tuple[str, Path]]:
    """Every model repository in the cache with its snapshot folder; empty when the client is not installed."""
    try:
        cache = Path(_hub().constants.HF_HUB_CACHE)
    except ModelLoadError:
        return
    for entry in sorted(cache.glob("models--*--*")):
        repo = "/".join(entry.name.split("--")[1:])
        folder = cached_folder(repo)
        if folder is not None:
            yield repo, folder


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, links followed: a snapshot is made of links into the cache."""
    return sum(os.stat(f).st_size for f in folder.rglob("*") if f.is_file())


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise ModelLoadError('models from the hub need huggingface_hub; install it with: pip install "minfer[hub]"') from error
    return huggingface_hub


def _why(repo: str, revision: str | None, tried: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{repo!r} is gated: accept its licence at https://huggingface.co/{repo} and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub has no model {repo!r}, or it is private and HF_TOKEN is not set; check the spelling (`minfer list` shows short names)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo!r} has no revision {revision!r}; give an existing branch, tag or commit"
    return (
        f"{repo!r} is not on this machine ({tried}) and the hub can't be reached ({_short(error)}); "
        "connect to a network, or give a local folder or .gguf file"
    )


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
