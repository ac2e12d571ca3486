from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer.errors import ModelLoadError
from minfer.loader import ModelSource, open_checkpoint
from minfer.loader.gguf_header import read_header


def header(*, version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes = b"x", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_every_value_type_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 4_000_000_000,
        "int32": -2_000_000_000,
        "uint64": 2**63,
        "int64": -(2**62),
        "float32": 0.1,
        "float64": 0.1,
        "bool": True,
        "string": "grüße",
    }.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_array("a.strings", ["x", "", "ÿ"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 0.1])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("w", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("q", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_against_the_package(path, gguf.GGUFReader(path))


def test_smollm2_header_as_the_gguf_package_reads_it(smollm2: Path, smollm2_reader: gguf.GGUFReader) -> None:
    check_against_the_package(smollm2, smollm2_reader)


def check_against_the_package(path: Path, theirs: gguf.GGUFReader) -> None:
    ours = read_header(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, field in fields.items():
        assert ours.metadata[key] == field.contents(), key
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        row = ours.tensors[t.name]
        assert (row.shape, row.type_id, row.offset, row.num_bytes) == (
            tuple(int(d) for d in reversed(t.shape)),
            int(t.tensor_type),
            t.data_offset,
            t.n_bytes,
        )


HUGE = 2**63


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty|GGUF"),
        (b"GGUF", "does not start with a GGUF header"),
        (b"PK\x03\x04" + b"\0" * 100, "does not start with a GGUF header"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (header(tensors=HUGE), "number of tensors is 9223372036854775808"),
        (header(tensors=100), "number of tensors is 100, more than the file can hold"),
        (header(keys=HUGE), "number of metadata keys"),
        (header(keys=1, rest=struct.pack("<Q", HUGE) + b"\0" * 32), "metadata key"),
        (header(keys=1, rest=string(b"a") + struct.pack("<IIQ", 9, 4, HUGE)), "length of a is 9223372036854775808"),
        (header(keys=1, rest=string(b"a") + struct.pack("<IIQ", 9, 8, 1000) + b"\0" * 64), "length of a is 1000, more than"),
        (header(keys=1, rest=string(b"a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 64), "arrays of arrays"),
        (header(keys=1, rest=string(b"a") + struct.pack("<II", 99, 0)), "value type 99 is unknown"),
        (header(keys=1, rest=string(b"\xff") + struct.pack("<IB", 0, 0)), "UTF-8"),
        (header(keys=2, rest=(string(b"a") + struct.pack("<IB", 0, 0)) * 2), "'a' appears twice"),
        (header(tensors=1, rest=tensor(dims=(HUGE, HUGE)) + b"\0" * 200), "truncated in tensor 'x'"),
        (header(tensors=1, rest=tensor(dims=(2**32, 2**32)) + b"\0" * 200), "truncated in tensor 'x'"),
        (header(tensors=1, rest=tensor(dims=(0,)) + b"\0" * 200), r"shape \[0\]"),
        (header(tensors=1, rest=string(b"x") + struct.pack("<I", 2**31) + b"\0" * 99), "2147483648 dimensions"),
        (header(tensors=1, rest=tensor(dims=(33,), kind=2) + b"\0" * 200), "blocks of 32"),
        (header(tensors=1, rest=tensor(kind=4) + b"\0" * 200), "type 4, unknown"),
        (header(tensors=1, rest=tensor(offset=3) + b"\0" * 200), "offset 3, which is not a multiple"),
        (header(tensors=1, rest=tensor(offset=2**64 - 32) + b"\0" * 200), "truncated in tensor 'x'"),
        (header(tensors=2, rest=tensor() + tensor(offset=128) + b"\0" * 400), "'x' appears twice"),
        (header(tensors=2, rest=tensor() + tensor(b"y", offset=32) + b"\0" * 400), "'x' and 'y' overlap"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_every_truncation_of_a_real_header(gguf_shaped: Callable[..., Path], tmp_path: Path) -> None:
    data = gguf_shaped().read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 7), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelLoadError):
            read_header(path)
    with pytest.raises(ModelLoadError, match=r"truncated in tensor '.*expected at least"):
        read_header(path)


@settings(max_examples=250, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_load_error_or_load_without_much_memory(
    gguf_shaped: Callable[..., Path], tmp_path: Path, data: st.DataObject
) -> None:
    original = tmp_path / "model.gguf"
    damaged = bytearray((original if original.exists() else gguf_shaped()).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, 2600))  # the header, and a little of the data
        width, value = data.draw(st.sampled_from([("<B", 255), ("<I", 2**32 - 1), ("<Q", 2**64 - 1)]))
        struct.pack_into(width, damaged, position, data.draw(st.integers(0, value)))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        for _, loaded in open_checkpoint(ModelSource(kind="gguf", name="damaged", path=path)).tensors():
            loaded.sum()
    except ModelLoadError:
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert time.monotonic() - start < 2


def test_directory_and_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelLoadError, match="can't be read as GGUF"):
            read_header(path)


def test_without_the_gguf_package(gguf_shaped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = gguf_shaped()
    blocked: dict[str, Any] = {name: None for name in sys.modules if name == "gguf" or name.startswith("gguf.")}
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelLoadError, match=r'pip install "minfer\[gguf\]"'):
        read_header(path)
