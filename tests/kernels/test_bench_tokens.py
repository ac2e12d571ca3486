"""The bench's cases behind the last layer, and of LoRA: what they count, that compiled tables take them, and that libraries do the same."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels.devices import DEVICE

from minfer.kernels import Ops, select_ops
from minfer.kernels.bench_cases import cases, lora_rows
from minfer.kernels.bench_shapes import SHAPES, Case, Shape, Sizes
from minfer.kernels.bench_tokens import DRAWS, peaked, token_cases
from minfer.kernels.cpu.library import find
from minfer.runner.lora_rows import PROMPT_TILE_ROWS, TILE_ROWS, LoraBuffers

SIZES = Sizes(Shape(64, 4, 2, 16, 128, 1000), torch.float32, torch.device("cpu"), (16,), 64, rounds_inputs=False)


@functools.cache
def table(name: str) -> Ops:
    if name == "cpu":
        if find() is None:
            pytest.skip("the compiled CPU kernels are not built")
        return select_ops(torch.device("cpu"), torch.float32, "cpu")
    from minfer.kernels.triton import TritonBackend

    return Ops([TritonBackend(DEVICE, torch.float32)], torch.float32)


def case(name: str, rows: int = 3) -> Case:
    return next(found for found in cases(SIZES, rows) if found.name.startswith(name))


def test_logits_are_read_once_and_masks_write_them_again() -> None:
    moved = {found.name: found.bytes for found in token_cases(SIZES, 3)}
    assert moved.pop("forbid") == 2 * 4 * 3 * 1000 + 3 * 4 * 32  # 1000 bits are 32 words
    assert set(moved.values()) == {4 * 3 * 1000}
    assert {"argmax", "sample, greedy", "sample, from all", "sample, top-k 50", "sample, top-p 0.9"} < set(moved)
    assert list(token_cases(SIZES, 65)) == []


@pytest.mark.parametrize("shape", ["llama2-7b", "qwen3-30b-a3b"])
def test_nine_tenths_of_the_weight_are_on_some_hundred_tokens(shape: str) -> None:
    torch.manual_seed(0)
    ranked = peaked(replace(SIZES, shape=SHAPES[shape]), 16).softmax(-1).sort(-1, descending=True).values
    nucleus = (ranked.cumsum(-1) < 0.9).sum(-1).float().mean()
    assert 20 < nucleus < 500


@pytest.mark.parametrize("op", [*(f"sample, {name}" for name in DRAWS), "likeliest", "logprobs", "forbid", "lora"])
@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_compiled_tables_take_them(name: str, op: str) -> None:
    sizes = replace(SIZES, shape=replace(SIZES.shape, vocab=300), device=DEVICE if name == "triton" else SIZES.device)
    call = next(found for found in cases(sizes, 1) if found.name.startswith(op)).make(table(name))
    lacking = {"triton": {"likeliest"}, "cpu": {"logprobs", "forbid"}}
    assert (call is None) == (op in lacking[name])
    if call is not None:
        call()


def test_a_draw_asks_for_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, seen = Ops([*select_ops(torch.device("cpu"), torch.float32, "reference").backends], torch.float32), {}
    monkeypatch.setattr(ops, "sample", lambda logits, *asked: seen.update(zip(("wishes", "positions"), asked, strict=True)))
    for name, wish in (("greedy", [0, 0, 1, 0]), ("from all", [1, 0, 1, 0]), ("top-k 50", [1, 50, 1, 0]), ("top-p 0.9", [1, 0, 0.9, 0])):
        seen.clear()
        call = case(f"sample, {name}").make(ops)
        assert call is not None
        call()
        assert seen["wishes"][:, 2:].tolist() == [wish] * 3
        assert len(seen["positions"].unique()) == 3


def test_libraries_do_the_same_work() -> None:
    """The draw from all tokens, which no name of torch's says, draws each as often as it should."""
    torch.manual_seed(0)
    sizes = replace(SIZES, shape=replace(SIZES.shape, vocab=4))
    draw = next(found for found in token_cases(sizes, 64) if found.name == "sample, from all").library
    assert draw is not None
    call = draw()
    logits = next(cell.cell_contents for cell in call.__closure__ or () if isinstance(cell.cell_contents, torch.Tensor))
    drawn = torch.stack([call() for _ in range(300)])
    found = torch.stack([(drawn == token).float().mean(0) for token in range(4)], -1)
    torch.testing.assert_close(found, logits.softmax(-1), atol=0.12, rtol=0)
    assert {name for name in ("sample, top-k 50", "sample, top-p 0.9") if case(name).library is not None} == set()
    assert all(case(name).library is not None for name in ("sample, greedy", "likeliest", "logprobs", "forbid"))


@pytest.mark.parametrize(("rows", "adapters", "tile_rows"), [(3, 3, 16), (40, 16, 16), (64, 2, 16), (150, 1, 64)])
def test_rows_are_cut_as_the_runner_cuts_them(rows: int, adapters: int, tile_rows: int) -> None:
    got = lora_rows(rows, adapters, tile_rows, SIZES.device)
    of_rows = [1 + row % adapters for row in range(rows)]
    assert tile_rows in (TILE_ROWS, PROMPT_TILE_ROWS)
    counts = [1] * rows if tile_rows == TILE_ROWS else [rows]
    wanted = LoraBuffers.empty(rows, adapters).fill(of_rows[: len(counts)], counts)
    np.testing.assert_array_equal(got.rows, wanted.rows)
    np.testing.assert_array_equal(got.tiles, wanted.tiles)
    assert (got.groups, got.tile_rows) == (wanted.groups, wanted.tile_rows)


def test_lora_counts_the_adapters_that_rows_have() -> None:
    decode, many, prompt = (case("lora", rows) for rows in (3, 40, 100))
    assert [found.name.split(" of ")[0] for found in (decode, many, prompt)] == ["lora, 3", "lora, 16", "lora, 1"]
    n, k = 64 + 2 * 32, 64
    assert decode.bytes == 4 * (3 * 16 * (3 * k + n) + 3 * (k + 2 * n))
    assert prompt.bytes == 4 * (16 * (3 * k + n) + 100 * (k + 2 * n))
    assert many.operations == 2 * 40 * 16 * (3 * k + n)
