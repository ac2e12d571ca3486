"""What was downloaded: whether it is what the hub sent, and taking it away again.

The hub client's cache keeps each file once, named by its content, and links to it from a snapshot:

    models--org--name/blobs/<sha256 of a large file, or git's sha1 of a small one>
    models--org--name/snapshots/<commit>/model.safetensors -> ../../blobs/...

The client checks a download's length. Its name says what the content must be, so that can be checked too, at any time and offline.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from minfer.errors import ModelLoadError
from minfer.loader import hub, names
from minfer.loader.gguf import split_parts
from minfer.loader.resolve import REPO

_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_PIECE = 1 << 22


def repository_of(name: str) -> tuple[str, str]:
    """What a name stands for on the hub: (repository, file in it or ""). Raises ModelLoadError for what isn't from there."""
    known = names.find(name)
    if known is not None:
        model, twin = known
        target = model.twins[twin] if twin else model.repo
    else:
        target = name
    repo, _, file = target.partition(":")
    if not REPO.fullmatch(repo):
        raise ModelLoadError(f"{name!r} is neither a short name nor a hub id (org/name), so it was not downloaded by minfer")
    return repo, file


def check(folder: Path) -> Iterator[tuple[Path, bool | None]]:
    """Each file of a snapshot, and whether it is what its name in the cache says; None where the name says nothing."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = file.resolve().name if file.is_symlink() else ""
        yield file, _digest_of(file, digest) == digest if _DIGEST.fullmatch(digest) else None


def drop(file: Path) -> int:
    """Removes a snapshot's file and what it links to; the bytes that frees."""
    target = file.resolve()
    size = target.stat().st_size
    file.unlink()
    if target != file and not _still_linked(target, file):
        target.unlink(missing_ok=True)
    return size


def remove(name: str) -> tuple[str, int]:
    """Removes a downloaded model, or one GGUF file of a repository: (what was removed, bytes freed). ModelLoadError if it isn't here."""
    repo, file = repository_of(name)
    root = hub.repository_folder(repo)
    if root is None:
        raise ModelLoadError(f"{name!r} has not been downloaded; `minfer list` shows what is here")
    if not file:
        size = hub.size_of(root / "blobs")
        shutil.rmtree(root)
        return repo, size
    folder = hub.cached_folder(repo)
    parts = [folder / part for part in split_parts(Path(file)) if (folder / part).is_file()] if folder is not None else []
    if not parts:
        raise ModelLoadError(f"{file!r} of {repo!r} has not been downloaded; `minfer list` shows what is here")
    return f"{repo}:{file}", sum(drop(part) for part in parts)


def _digest_of(file: Path, like: str) -> str:
    """sha256 of the content, or git's sha1 of it as a blob: whichever is as long as `like`."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _still_linked(target: Path, without: Path) -> bool:
    """Whether another snapshot has the same content."""
    snapshots = target.parent.parent / "snapshots"
    return any(other != without and other.is_symlink() and other.resolve() == target for other in snapshots.rglob("*"))
