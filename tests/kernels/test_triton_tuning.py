"""The table of block shapes: what is looked up, what is said when it isn't there, and what it may hold."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from kernels.devices import DEVICE, randn

from minfer.errors import ConfigError
from minfer.kernels.ops import Weight
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.tuning import TABLE, Tuning, shape_class
from minfer.quant import PackedWeight, QuantScheme

DEFAULT = {"BLOCK_M": 16, "num_warps": 4}


def test_rows_share_an_entry_up_to_the_next_power_of_two() -> None:
    assert shape_class("linear", "int4", 1) == "linear int4, 1 row"
    assert shape_class("linear", "int4", 9) == shape_class("linear", "int4", 16) == "linear int4, 16 rows"
    assert shape_class("linear", "int4", 300) == shape_class("linear", "int4", 256)


def test_a_missing_entry_takes_the_default_and_is_said_once_and_only_to_who_asks_for_it(caplog: pytest.LogCaptureFixture) -> None:
    tuning = Tuning({})
    with caplog.at_level(logging.DEBUG, "minfer.kernels"):
        assert tuning.blocks("linear int4, 16 rows", DEFAULT) == DEFAULT
        tuning.blocks("linear int4, 16 rows", DEFAULT)
    assert [(record.levelname, "linear int4, 16 rows" in record.message) for record in caplog.records] == [("DEBUG", True)]


def test_an_entry_decides_what_it_names() -> None:
    tuning = Tuning({"linear int4, 16 rows": {"BLOCK_M": 32, "source": "measured"}})
    assert tuning.blocks("linear int4, 16 rows", DEFAULT) == {"BLOCK_M": 32, "num_warps": 4}
    with pytest.raises(ConfigError, match="BLOCK_X, which its kernel doesn't have"):
        Tuning({"a": {"BLOCK_X": 1}}).blocks("a", DEFAULT)


def test_the_committed_table_is_read_and_every_entry_says_where_it_comes_from() -> None:
    for architecture, entries in json.loads(TABLE.read_text()).items():
        assert Tuning.of(architecture)
        for entry in entries.values():
            assert entry["source"].startswith(("measured", "predicted"))
    assert Tuning.of("cuda:10").blocks("linear int4, 1 row", DEFAULT) == DEFAULT


def test_the_kernels_use_it() -> None:
    matrix = PackedWeight(torch.randint(-8, 8, (40, 256), dtype=torch.int8), torch.rand(40, 8), None, QuantScheme("int4", 32, True))
    names = {"linear int4 by 32, 32 rows": {"BLOCK_M": 16, "BLOCK_N": 16}, "linear int4 by 32, 1 row": {"BLOCK_N": 32, "TILE": 2}}
    x = randn(20, 256)
    expected = x.double().cpu() @ matrix.dequantize(torch.float64).T
    for tuning in (Tuning({}), Tuning(names)):
        weight = TritonBackend(DEVICE, torch.float32, tuning=tuning).prepare(matrix, torch.float32)
        assert isinstance(weight, Weight)
        for rows in (x, x[:1]):
            torch.testing.assert_close(weight.linear(rows, None).double().cpu(), expected[: len(rows)], rtol=1e-4, atol=1e-4)
