"""Matrices that were quantised while loading, kept under the user's cache folder for the next start.

    <root>/quantised/<model>-<method>-<key>/<tensor name>.safetensors

`root` is $MINFER_CACHE, else $XDG_CACHE_HOME/minfer, else ~/.cache/minfer. The key is a hash of the method's settings, of the
format below, and of what identifies the weights: name, size, modification time, first and last 64 KiB of every weight file (the
first hold the header). Hashing whole files would cost a read of everything at each start; somebody who edits one tensor in the
middle of a file and puts its time back gets the old entry, and nobody does that by accident.

One file a matrix, so that it needs the memory of one matrix, an interrupted conversion goes on where it stopped, and damage costs
one matrix. A file is written beside its place and renamed, thus is whole or absent; a CRC-32 over its tensors finds what the disk
did to it since. Whatever is wrong with an entry, the answer is the same: say so, and make it again.

Entries are never removed: `entries` lists them with their sizes for `minfer env`, and the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minfer.errors import ModelLoadError
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.bits import unpack_nibbles
from minfer.quant.elements import ELEMENT_BITS

logger = logging.getLogger("minfer.load")

FORMAT = "1"  # part of the key: raise it whenever a file would be read differently
SAMPLE_BYTES = 2**16


def cache_root() -> Path:
    own = os.environ.get("MINFER_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minfer"


def file_identity(files: Iterable[Path]) -> str:
    """What tells these weight files from others: see above. Raises ModelLoadError if one can't be read."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            with file.open("rb") as f:
                head = f.read(SAMPLE_BYTES)
                f.seek(max(0, status.st_size - SAMPLE_BYTES))
                tail = f.read(SAMPLE_BYTES)
        except OSError as error:
            raise ModelLoadError(f"{file} can't be read: {error.strerror}") from error
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode() + head + tail)
    return digest.hexdigest()


def entry_folder(model: str, method: str, identity: str, settings: str = "") -> Path:
    """Where the quantised form of these weights lies, or will. `model` is only for people who look into the folder."""
    key = hashlib.sha256("\0".join((FORMAT, method, settings, identity)).encode()).hexdigest()[:20]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.")[:60] or "model"
    return cache_root() / "quantised" / f"{readable}-{method}-{key}"


def entries() -> list[tuple[Path, int]]:
    """Every entry with its bytes on disk."""
    folders = sorted((cache_root() / "quantised").glob("*/"))
    return [(folder, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())) for folder in folders]


class WeightCache:
    """One entry: the quantised matrices of one checkpoint. A cache that can't be written to is said once and done without."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hits = 0
        self._writable = True

    def get(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """The matrix, or None if it isn't there; one that is damaged isn't there, and the log says so."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            packed = _read(path)
            if tuple(packed.shape) != shape:
                raise ValueError(f"it is a matrix {list(packed.shape)}, expected {list(shape)}")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, ModelLoadError) as error:
            logger.warning("%s is damaged and is made again: %s", path, error)
            return None
        self.hits += 1
        return packed

    def put(self, name: str, packed: PackedWeight) -> None:
        """Writes the matrix; of two processes that write the same one, either's file stands."""
        if not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            os.close(handle)
            try:
                _write(Path(temporary), packed)
                os.replace(temporary, self._path(name))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        except (OSError, SafetensorError) as error:
            self._writable = False
            logger.warning("quantised weights are not cached: %s can't be written (%s)", self.folder, error)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _write(path: Path, packed: PackedWeight) -> None:
    tensors = {"codes": _dense(packed.codes, packed.scheme), "scales": _short(packed.scales)}
    optional = {"mins": packed.mins if packed.mins is None else _short(packed.mins), "levels": packed.levels, "order": packed.input_order}
    tensors |= {name: tensor.contiguous() for name, tensor in optional.items() if tensor is not None}
    scheme = json.dumps(dataclasses.asdict(packed.scheme))
    save_file(tensors, path, metadata={"scheme": scheme, "crc32": str(_checksum(tensors, scheme))})


def _read(path: Path) -> PackedWeight:
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dictionary
    if int(metadata["crc32"]) != _checksum(tensors, metadata["scheme"]):
        raise ValueError("its checksum is another")
    scheme = QuantScheme(**json.loads(metadata["scheme"]))
    codes = tensors["codes"]
    if codes.dtype == torch.uint8:
        codes = unpack_nibbles(codes).view(torch.int8)
        if scheme.element == "int4" and scheme.symmetric:
            codes = codes - 8
    mins = tensors.get("mins")
    scales = tensors["scales"].float()
    return PackedWeight(codes, scales, None if mins is None else mins.float(), scheme, tensors.get("levels"), tensors.get("order"))


def _dense(codes: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Two 4-bit codes in a byte of type uint8, the first in the low half; other codes as they are, int8."""
    if ELEMENT_BITS[scheme.element] != 4 or codes.shape[1] % 2:
        return codes.contiguous()
    unsigned = (codes + 8 if scheme.element == "int4" and scheme.symmetric else codes).view(torch.uint8)
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def _short(values: torch.Tensor) -> torch.Tensor:
    """As float16 where nothing is lost by it."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values.contiguous()


def _checksum(tensors: dict[str, torch.Tensor], scheme: str) -> int:
    value = zlib.crc32(scheme.encode())
    for name in sorted(tensors):
        value = zlib.crc32(f"{name}{list(tensors[name].shape)}{tensors[name].dtype}".encode(), value)
        value = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, value)
    return value
