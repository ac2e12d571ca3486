"""The table of quantised checkpoints: its figures from hand-made rows, its pages from their files, every row's recipe a sound one."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from compare import interop, quantization, quantize_cost, quantized, quantized_peers, weights
from compare.errors import CompareError
from compare.quantized import METHODS, PAIRS, ROUNDS_INPUTS, ROWS, Calibration, make
from minfer.quantize import Recipe, read_calibration
from minfer.tokenizer import Tokenizer

NO_DATA = Calibration(None, 1, 16)


def row(name: str, nll: list[float], kl: list[float]) -> dict[str, object]:
    figures = {"perplexity": math.exp(sum(nll) / len(nll)), "kl": sum(kl) / len(kl), "agreement": 0.5, "predictions": 8}
    return {"name": name, "bytes": 10**6, "bits_per_weight": 4.25, "window_nll": nll, "window_kl": kl, **figures}


def test_figures_of_one_window() -> None:
    sure, unsure = {3: math.log(0.75), 4: math.log(0.25)}, {3: math.log(0.25), 4: math.log(0.75)}
    found = quantization.figures([[1, 3, 4]], [[sure, unsure]], [[sure, sure]])
    assert found["perplexity"] == pytest.approx(4 / 3)
    assert found["agreement"] == 0.5
    assert found["kl"] == pytest.approx(0.5 * 0.5 * math.log(3), rel=1e-6)  # 0.75 ln 3 - 0.25 ln 3, on one of two positions


def test_differences_are_paired() -> None:
    """Two rows that differ by the same amount in windows that differ wildly: the difference is certain."""
    a, b = row("a", [1.0, 5.0, 3.0], [0, 0, 0]), row("b", [1.1, 5.1, 3.1], [0, 0, 0])
    share, error = quantization.difference(b, a)
    assert share == pytest.approx(math.expm1(0.1))
    assert error == pytest.approx(0, abs=1e-12)


def test_the_table_has_a_line_for_each_row_and_known_pair() -> None:
    rows = [row(name, [1.0, 2.0], [0.1, 0.2]) for name in (quantization.SOURCE, *PAIRS[0])]
    facts = {"model": "m", "windows": 2, "window": 5, "text": {"name": "t"}, "calibration": "c", "command": ["x"]}
    lines = quantization.tables({**facts, "rows": rows}).splitlines()
    assert sum(line.startswith(f"| {PAIRS[0][0]} |") for line in lines) == 2
    assert sum("+0.00% ± 0.00" in line for line in lines) == 3


def test_every_row_is_a_recipe_and_every_pair_is_of_rows() -> None:
    for flags in METHODS.values():
        words = shlex.split(flags)
        given = dict(zip(words[::2], words[1::2], strict=False))
        Recipe(method=given["--method"], bits=int(given.get("--bits", 4)), group_size=int(given.get("--group-size", 32)))  # type: ignore[arg-type]
    assert {name for pair in PAIRS for name in pair} <= set(ROWS)
    assert all(any(name.startswith(start) for name in METHODS) for start in ROUNDS_INPUTS)


def test_what_can_not_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CompareError, match="python -m compare setup llamacpp"):
        make("llama.cpp Q4_0", tmp_path, tmp_path / "work", NO_DATA)
    with pytest.raises(CompareError, match="NF4, blocks of 64 could not be made"):
        make("NF4, blocks of 64", tmp_path / "nothing", tmp_path / "work", NO_DATA)
    with pytest.raises(CompareError, match="give --calibration"):
        make("gptqmodel, 4 bits, groups of 64", tmp_path, tmp_path / "work", NO_DATA)


def test_other_tools_see_the_samples_that_minfer_quantize_takes(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    seen = []

    def stand_in(name: str, weights: Path, samples: Path, out: Path) -> None:
        seen.extend(json.loads(samples.read_text()))

    monkeypatch.setattr(quantized, "make_peer", stand_in)
    make("gptqmodel, 4 bits, groups of 64", tiny_tokenizer, tmp_path, Calibration(text, 3, 16))
    tokenizer = Tokenizer.from_folder(tiny_tokenizer)
    assert seen == read_calibration(text, lambda words: tokenizer.encode(words, add_special_tokens=False), 3, 16)


def test_a_tool_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(quantized_peers, "setup", lambda info, device, say: Path(sys.executable))
    tool = quantized_peers.Tool(quantized_peers.TOOLS["gptqmodel"].info, "raise SystemExit('no such kernel | on this machine')")
    monkeypatch.setitem(quantized_peers.TOOLS, "gptqmodel", tool)
    quantized_peers.engine_root("gptqmodel").mkdir(parents=True)
    with pytest.raises(CompareError, match=r"groups of 64 could not be made: no such kernel \| on this machine"):
        quantized_peers.make_peer("gptqmodel, 4 bits, groups of 64", tmp_path, tmp_path / "samples.json", tmp_path / "out")
    facts = {"model": "m", "windows": 2, "window": 5, "text": {"name": "t"}, "calibration": "c", "command": ["x"]}
    rows = [row(quantization.SOURCE, [1.0, 2.0], [0.1, 0.2])]
    page = quantization.tables({**facts, "rows": rows, "failed": {"gptqmodel": "no such kernel | on this machine"}})
    assert page.endswith("| gptqmodel | `no such kernel / on this machine` |\n")


def test_an_earlier_file_is_kept_if_it_is_of_the_same_kind(tmp_path: Path) -> None:
    entry = {"checkpoint": "a", "engine": "vllm", "dtype": "float32"}
    interop.keep(tmp_path / "i.json", {**entry, "answers": 1})
    interop.keep(tmp_path / "i.json", {**entry, "dtype": "bfloat16"})
    interop.keep(tmp_path / "i.json", {**entry, "answers": 2})
    entries = json.loads((tmp_path / "i.json").read_text())["entries"]
    assert [(e["dtype"], e.get("answers")) for e in entries] == [("bfloat16", None), ("float32", 2)]


def test_no_token_of_the_weights_folder_is_beyond_the_vocabulary(tmp_path: Path) -> None:
    """WikiText is full of "<unk>", which this vocabulary doesn't have."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {"tokens": tokens, "merges": [], "token_type": [1] * len(tokens), "bos_token_id": 0, "eos_token_id": 1}
    weights._write_bpe_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in names.items()})
    assert max(Tokenizer.from_folder(tmp_path).encode("the <unk> of <unk>")) < len(tokens)


def test_the_page_is_made_of_the_files() -> None:
    page, results = quantization.PAGE.read_text(), quantization.ROOT / "results"
    assert quantization.tables(json.loads((results / "quantization-smollm2-135m.json").read_text())) in page
    assert interop.table(json.loads((results / "interop-smollm2-135m.json").read_text())) in page
    assert quantize_cost.fill(page, json.loads((results / "quantize-cost.json").read_text())) == page
