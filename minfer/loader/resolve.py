"""What the user typed -> a `ModelSource`. In this order: something on disk, a short name, a hub id.

    ./folder, model.gguf        as it is
    smollm2-135m                names.py: the hub cache, an installed package that carries it, then the hub
    org/name, org/name:f.gguf   the hub cache, then the hub

A folder in Hugging Face's layout wins over GGUF files beside it, unless `load_format` says otherwise. What is on disk wins over the
hub, so a folder named like a hub id shadows it, as everywhere in this field.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minfer.config import LoadFormat
from minfer.errors import ModelLoadError
from minfer.loader import hub, names
from minfer.loader.checkpoint import TOKENIZER_FILES, ModelSource, TokenizerSource
from minfer.loader.gguf import SPLIT, split_parts
from minfer.loader.gguf_header import read_header
from minfer.loader.open import open_checkpoint

# The hub's own rule; it also keeps "..", absolute paths and option-like names out of file paths.
REPO = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*", re.ASCII)
GGUF_FILE = re.compile(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*\.gguf", re.ASCII)


@dataclass(frozen=True)
class OfflineModel:
    """A model that can be served without a network: what to type, where it lies, and the bytes it takes on disk."""

    name: str
    format: str
    location: Path
    size_bytes: int


def resolve_model(name: str, *, revision: str | None = None, load_format: LoadFormat = "auto") -> ModelSource:
    """Finds a model, downloading it if need be; raises `ModelLoadError` that says what was tried and what to do."""
    if not name or "\0" in name:
        raise ModelLoadError("no model was given; name a folder, a .gguf file, a hub id or a short name (`minfer list` shows those)")
    _check_revision(revision)
    path, known = _path(name), names.find(name)
    if revision is not None and (path is not None or (known is not None and load_format == "dummy")):
        raise ModelLoadError(f"revision {revision!r} means nothing for {name!r}, which is not taken from the hub; leave it out")
    if path is not None:
        return _local(name, path, load_format)
    if known is not None:
        return _known(name, *known, revision, load_format)
    repo, _, file = name.partition(":")
    if REPO.fullmatch(repo) and not repo.endswith(".gguf") and (not file or GGUF_FILE.fullmatch(file)):
        return _from_hub(name, repo, file, revision, load_format)
    raise ModelLoadError(
        f"there is no file or folder {name!r}, and it is neither a hub id (org/name) nor a short name: {', '.join(names.KNOWN)}"
    )


def quantised_twin(name: str, quant: str) -> str:
    """The short name of the checkpoint that somebody made of this model with this method; `name` itself where none is known."""
    known = names.find(name) if _path(name) is None else None
    return f"{name}-{quant}" if known is not None and known[1] is None and quant in known[0].twins else name


def resolve_tokenizer(name: str, *, revision: str | None = None) -> TokenizerSource:
    """A tokenizer other than the model's: a folder, .gguf file, short name or hub id (only its small files are fetched).

    `revision` is the model's and may well be set for that alone, so here it counts for hub ids only.
    """
    _check_revision(revision)
    path = _path(name)
    if path is not None and path.is_file() and path.suffix != ".gguf":
        raise ModelLoadError(f"tokenizer {name!r} is a file; give the folder that holds it, which has its settings too")
    if path is not None and any((path / file).is_file() for file in TOKENIZER_FILES):
        return path
    known = names.find(name) if path is None else None
    packaged = _packaged(known[0]) if known else None
    if packaged is not None:
        source = ModelSource(kind="gguf", name=name, path=packaged)
    elif known is not None:
        source = _from_hub(name, known[0].repo, "", revision, "dummy")
    else:
        source = resolve_model(name, revision=revision if path is None else None, load_format="dummy")
    if source.path is None or source.path.is_dir():
        return source.path
    return read_header(source.path).metadata


def list_offline_models() -> list[OfflineModel]:
    """Short names first, then the rest of the hub cache: whatever opens, so other people's BERTs stay out. Looks at disks only."""
    cached = list(hub.cached_repositories())
    whole = ((repo, folder) for repo, folder in cached if hub.missing_weights(folder) is None)
    repositories = {repo: folder for repo, folder in whole if _opens(ModelSource(kind="folder", name=repo, path=folder))}
    found = []
    for name, model in names.KNOWN.items():
        packaged = _packaged(model)
        if model.repo in repositories:
            folder = repositories.pop(model.repo)
            found.append(OfflineModel(name, "safetensors", folder, hub.size_of(folder)))
        elif packaged is not None:
            found.append(OfflineModel(name, "gguf", packaged, packaged.stat().st_size))
    found += [OfflineModel(repo, "safetensors", folder, hub.size_of(folder)) for repo, folder in repositories.items()]
    for repo, folder in cached:
        for file in _first_parts(folder):
            name = f"{repo}:{file.relative_to(folder).as_posix()}"
            if _opens(ModelSource(kind="gguf", name=name, path=file)):
                found.append(OfflineModel(name, "gguf", file, sum(part.stat().st_size for part in split_parts(file))))
    return found


def _opens(source: ModelSource) -> bool:
    try:
        open_checkpoint(source)
    except ModelLoadError:
        return False
    return True


def _check_revision(revision: str | None) -> None:
    if revision is not None and not REVISION.fullmatch(revision):  # it becomes part of a path in the cache
        raise ModelLoadError(f"revision {revision!r} is not the name of a branch, tag or commit")


def _path(name: str) -> Path | None:
    """The file or folder of that name, or None. os.path answers for names that pathlib raises on (too long, unknown ~user)."""
    expanded = os.path.expanduser(name)
    return Path(expanded) if name and os.path.exists(expanded) else None


def _local(name: str, path: Path, load_format: LoadFormat) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{path} is not a .gguf file; give the folder that holds config.json and the .safetensors files")
        if load_format == "safetensors":
            raise ModelLoadError(f"{path} is a GGUF file, but load_format is 'safetensors'; use 'auto' or 'gguf'")
        return ModelSource(kind="dummy" if load_format == "dummy" else "gguf", name=path.stem, path=path)
    return _folder(name, path, load_format)


def _folder(name: str, folder: Path, load_format: LoadFormat) -> ModelSource:
    """A folder on disk or in the cache: Hugging Face's layout if it has a config.json, else the one GGUF model in it."""
    has_config = (folder / "config.json").is_file()
    if load_format == "dummy" and has_config:
        return ModelSource(kind="dummy", name=name, path=folder)
    if load_format == "safetensors" or (has_config and load_format == "auto"):
        return ModelSource(kind="folder", name=name, path=folder)
    files = _first_parts(folder)
    if not files:
        raise ModelLoadError(
            f"{folder} has neither config.json nor a .gguf file" if load_format != "gguf" else f"{folder} has no .gguf file"
        )
    if len(files) > 1:
        raise ModelLoadError(
            f"{folder} has several GGUF models; give the path of one: {', '.join(str(f.relative_to(folder)) for f in files)}"
        )
    return ModelSource(kind="dummy" if load_format == "dummy" else "gguf", name=name, path=files[0])


def _known(name: str, model: names.KnownModel, twin: str | None, revision: str | None, load_format: LoadFormat) -> ModelSource:
    if load_format == "dummy":
        if twin is not None:
            raise ModelLoadError(f"load_format 'dummy' makes unquantised weights; use {name.removesuffix('-' + twin)!r}")
        return ModelSource(kind="dummy", name=name, config=model.config)
    if twin is not None:
        repo, _, file = model.twins[twin].partition(":")
        return _from_hub(name, repo, file, revision, load_format)
    packaged = _packaged(model) if load_format in ("auto", "gguf") and revision is None else None
    if packaged is None:
        return _from_hub(name, model.repo, "", revision, load_format)
    folder = hub.cached_folder(model.repo) if importlib.util.find_spec("huggingface_hub") and load_format == "auto" else None
    if folder is not None and hub.missing_weights(folder) is None:
        return ModelSource(kind="folder", name=name, path=folder)
    return ModelSource(kind="gguf", name=name, path=packaged)


def _packaged(model: names.KnownModel) -> Path | None:
    """The file inside an installed package; found without importing it, as importing runs code that is of no use here."""
    if model.package is None:
        return None
    package, file_name = model.package
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / file_name
        if file.is_file():
            return file
    return None


def _from_hub(name: str, repo: str, file: str, revision: str | None, load_format: LoadFormat) -> ModelSource:
    folder = hub.cached_folder(repo, revision)
    if file:
        return _hub_gguf(name, repo, file, revision, folder, load_format)
    tried = "not in the hub cache"
    if folder is not None:
        if load_format == "gguf" or (load_format == "auto" and not (folder / "config.json").is_file() and _first_parts(folder)):
            return _folder(name, folder, load_format)
        lacking = hub.missing_weights(folder) if load_format != "dummy" else None if (folder / "config.json").is_file() else "config.json"
        if lacking is None:
            return _folder(name, folder, load_format)
        tried = f"its copy in the hub cache lacks {lacking}"
    listed = hub.repository_files(repo, revision, tried)
    wanted = hub.choose_files(listed, weights=load_format != "dummy")
    if load_format != "dummy" and not any(w.endswith(".safetensors") for w in wanted):
        raise ModelLoadError(_no_safetensors(repo, listed))
    return _folder(name, hub.download(repo, revision, wanted), load_format)


def _hub_gguf(name: str, repo: str, file: str, revision: str | None, folder: Path | None, load_format: LoadFormat) -> ModelSource:
    if load_format == "safetensors":
        raise ModelLoadError(f"{name!r} names a GGUF file, but load_format is 'safetensors'; use 'auto' or 'gguf'")
    parts = [part.as_posix() for part in split_parts(Path(file))]
    if folder is None or not all((folder / part).is_file() for part in parts):
        listed = hub.repository_files(repo, revision, f"{file} is not in the hub cache")
        for part in parts:
            if part not in listed:
                available = ", ".join(f for f in listed if f.endswith(".gguf")) or "none"
                raise ModelLoadError(f"{repo!r} has no file {part!r}; its GGUF files: {available}")
        folder = hub.download(repo, revision, parts)
    return ModelSource(kind="dummy" if load_format == "dummy" else "gguf", name=name, path=folder / parts[0])


def _no_safetensors(repo: str, files: Sequence[str]) -> str:
    ggufs = [f for f in files if f.endswith(".gguf") and not _later_part(f)]
    if ggufs:
        return f"{repo!r} holds GGUF files; name one of them: {', '.join(f'{repo}:{f}' for f in ggufs[:20])}"
    if any(f.endswith((".bin", ".pt", ".pth")) for f in files):
        return f"{repo!r} has only pickled weights, which minfer never loads; look for a conversion of it to safetensors or GGUF"
    return f"{repo!r} has no .safetensors or .gguf files"


def _first_parts(folder: Path) -> list[Path]:
    """GGUF files here and one level down, where repositories keep large ones; no deeper, as the folder may be somebody's home."""
    return [f for pattern in ("*.gguf", "*/*.gguf") for f in sorted(folder.glob(pattern)) if not _later_part(f.name)]


def _later_part(file: str) -> bool:
    match = SPLIT.fullmatch(file)
    return match is not None and int(match[2]) != 1
