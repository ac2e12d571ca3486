"""`minfer perplexity` against the same windows scored by transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_flags import TINY
from hypothesis import given
from hypothesis import strategies as st

from minfer.cli.perplexity import windows

TEXT = "Paged caches keep keys and values in blocks; a block holds sixteen tokens, and a table names them in order. " * 6


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    ids = list(range(length))
    scored: list[int] = []
    for window in windows(ids, size, stride):
        assert 1 <= window.first < len(window.ids) <= size
        assert window.ids == list(range(window.ids[0], window.ids[0] + len(window.ids)))
        scored += window.ids[window.first :]
    assert len(scored) == len(set(scored))
    never = set(ids) - set(scored)
    assert never == ({n for n in ids if n % stride == 0} if stride == size else set(ids[:1]))
    with_bos = [token for window in windows(ids, size, stride, lowest=0) for token in window.ids[window.first :]]
    assert with_bos == ids


def reference(folder: Path, window: int, stride: int, bos: bool) -> tuple[float, int]:
    """Perplexity and count, window by window, in float64 from transformers' logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    total, count, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        row = torch.tensor([([0] if bos else []) + part])
        with torch.no_grad():
            scores = model(row).logits[0].double().log_softmax(-1)
        for n, token in enumerate(part):
            before = n - 1 + bos  # the row that predicts token n
            if before >= 0 and start + n >= done:
                total -= scores[before, token].item()
                count += 1
        done = start + len(part)
        if done >= len(ids):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride", "bos"), [(64, 64, False), (64, 16, False), (48, 48, True), (33, 32, True), (400, 400, False)])
def test_against_transformers(minfer: Callable, tiny_llama: Path, tmp_path: Path, window: int, stride: int, bos: bool) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    flags = ["--window", window, "--stride", stride, "--bos" if bos else "--no-bos", "--json", *TINY]
    values = minfer("perplexity", tiny_llama, file, *flags).json
    expected, count = reference(tiny_llama, window, stride, bos)
    assert values["tokens"] == count
    assert values["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert (values["window"], values["stride"], values["bos"]) == (window, stride, bos)


def test_text_output_and_max_windows(minfer: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    ran = minfer("perplexity", tiny_llama, file, "--window", 32, "--max-windows", 2, *TINY)
    assert ran.code == 0
    value, sign, error = ran.out.split()
    assert float(value) > 1
    assert sign == "±"
    assert float(error) > 0
    assert "62 predictions in 2 windows" in ran.err


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "can't be read"),
        (b"\xff\xfe\x00", [], "UTF-8"),
        (b"", [], "0 tokens"),
        (b"a", [], "1 token"),
        (TEXT.encode() * 5, ["--window", 512], "lower --window"),
        (b"hello", ["--window", 8, "--stride", 9], "--stride 9"),
    ],
)
def test_what_cannot_be_measured(
    minfer: Callable, tiny_llama: Path, tmp_path: Path, content: bytes | None, flags: list, message: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    ran = minfer("perplexity", tiny_llama, file, *flags, "--json", *TINY)
    assert ran.code == 2
    assert message in ran.json["error"]["message"]
