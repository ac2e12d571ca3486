from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from minfer.loader.weight_cache import WeightCache, cache_root, entries, entry_folder, file_identity
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import round_to_nearest

SCHEMES = [
    QuantScheme("int4", 32, True),
    QuantScheme("int4", 32, False),
    QuantScheme("int8", 48, True),
    QuantScheme("int3", 32, True),
    QuantScheme("fp8_e4m3", 96, True),
    QuantScheme("nf4", 32, True),
    QuantScheme("fp4_e2m1", 32, True, scale_type="e8m0"),
]


def same(a: PackedWeight, b: PackedWeight) -> bool:
    fields = [(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "mins", "levels", "input_order")]
    return a.scheme == b.scheme and all((x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in fields)


@pytest.fixture
def packed() -> PackedWeight:
    return round_to_nearest(torch.randn(8, 96, generator=torch.Generator().manual_seed(0)), QuantScheme("int4", 32, True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name} {'symmetric' if scheme.symmetric else 'with minima'}")
def test_what_is_put_is_got(scheme: QuantScheme, tmp_path: Path) -> None:
    cache, weight = WeightCache(tmp_path), round_to_nearest(torch.randn(8, 96), scheme)
    assert cache.get("a.weight", (8, 96)) is None
    cache.put("a.weight", weight)
    again = WeightCache(tmp_path).get("a.weight", (8, 96))
    assert again is not None
    assert same(again, weight)
    if scheme.element in ("int4", "nf4", "fp4_e2m1"):
        assert (tmp_path / "a.weight.safetensors").stat().st_size < 8 * 96 / 2 + 8 * 3 * 8 + 700  # two codes a byte


def test_every_damaged_byte_is_noticed(packed: PackedWeight, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each byte of the file, one after the other: the matrix comes out right, or not at all and with a line that names the file."""
    cache = WeightCache(tmp_path)
    cache.put("w", packed)
    file = tmp_path / "w.safetensors"
    sound = file.read_bytes()
    missed = 0
    for at in range(len(sound)):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 0x15]) + sound[at + 1 :])
        caplog.clear()
        got = cache.get("w", (8, 96))
        assert got is None or same(got, packed), at
        assert (got is None) == (f"{file} is damaged and is made again" in caplog.text), at
        missed += got is not None
    assert missed < 16  # spaces of the header's padding


@pytest.mark.parametrize("size", [0, 1, 7, 8, 200, -1])
def test_a_file_cut_short_is_not_there(size: int, packed: PackedWeight, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    cache.put("w", packed)
    file = tmp_path / "w.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert cache.get("w", (8, 96)) is None
    cache.put("w", packed)
    assert cache.get("w", (8, 96)) is not None


def test_a_matrix_of_another_shape_is_not_the_one(packed: PackedWeight, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    cache.put("w", packed)
    assert cache.get("w", (96, 8)) is None


def test_nothing_half_written_is_left(packed: PackedWeight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        WeightCache(tmp_path).put("w", packed)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_once(packed: PackedWeight, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = WeightCache(tmp_path / "file" / "entry")
    with caplog.at_level(logging.WARNING, "minfer.load"):
        cache.put("a", packed)
        cache.put("b", packed)
    assert caplog.text.count("not cached") == 1


def test_the_key_follows_the_files_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "own"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 300_000)
    first = file_identity([file])
    assert file_identity([file]) == first
    stamp = file.stat().st_mtime_ns
    for change in (b"b" + b"a" * 299_999, b"a" * 299_999 + b"b", b"a" * 300_001):
        file.write_bytes(change)
        os.utime(file, ns=(stamp, stamp))
        assert file_identity([file]) != first
    file.write_bytes(b"a" * 300_000)
    os.utime(file, ns=(stamp, stamp + 1))
    assert file_identity([file]) != first
    folders = {entry_folder("org/some model", method, key, how) for method in ("int8", "int4") for key in "ab" for how in "xy"}
    assert len(folders) == 8
    assert all(folder.parent == tmp_path / "own" / "quantised" and folder.name.startswith("some-model-int") for folder in folders)


def test_where_the_cache_is_and_what_is_in_it(packed: PackedWeight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINFER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "minfer"
    assert entries() == []
    folder = entry_folder("m", "int4", "key")
    WeightCache(folder).put("w", packed)
    assert entries() == [(folder, (folder / "w.safetensors").stat().st_size)]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "minfer"
