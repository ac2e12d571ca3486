"""Bounds worked out by hand for a model small enough to count."""

from __future__ import annotations

import pytest

from compare.protocol import Request
from compare.roofline import Shape, bound
from compare.workloads import Case

CONFIG = {
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "vocab_size": 10,
    "intermediate_size": 8,
}
BODY = 3 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8)
CEILINGS = {"read_bytes_per_s": 1e6, "bf16_ops_per_s": 1e9, "int8_ops_per_s": 4e9}


def test_parameters_are_counted_as_the_matrices_say() -> None:
    untied = Shape.from_config(CONFIG)
    tied = Shape.from_config({**CONFIG, "tie_word_embeddings": True})
    assert untied.body == BODY
    assert untied.parameters == BODY + 80
    assert tied.parameters == BODY + 40
    assert untied.weights_read(2.0 * untied.parameters) == pytest.approx(2.0 * (BODY + 40))
    assert tied.weights_read(1000.0) == 1000.0
    assert untied.kv_bytes(5) == 2 * 3 * 2 * 2 * 5


def test_decode_is_bound_by_bytes_and_prefill_by_operations() -> None:
    shape = Shape.from_config({**CONFIG, "tie_word_embeddings": True})
    decode = Case("latency", "x", "decode_tokens_per_s", (Request([1] * 10, 4),))
    assert bound(decode, shape, CEILINGS, 1000.0, "bf16") == pytest.approx(1e6 / (1000 + shape.kv_bytes(12)))
    prefill = Case("prefill", "x", "prefill_tokens_per_s", (Request([1] * 1000, 1),))
    work = 2 * BODY * 1000 + 4 * 3 * 4 * 1000 * 1001 / 2 + 2 * 40
    assert bound(prefill, shape, CEILINGS, 1000.0, "bf16") == pytest.approx(1000 / (work / 1e9))
    assert bound(prefill, shape, CEILINGS, 1000.0, "int4") == pytest.approx(1000 / (work / 4e9))


def test_a_batch_shares_the_weights() -> None:
    shape = Shape.from_config(CONFIG)
    one = Case("s", "1", "decode_tokens_per_s", (Request([1], 2),))
    many = Case("s", "8", "decode_tokens_per_s", (Request([1], 2),) * 8, concurrency=8)
    alone, together = bound(one, shape, CEILINGS, 1e5, "bf16"), bound(many, shape, CEILINGS, 1e5, "bf16")
    assert alone is not None
    assert together is not None
    assert 7 < together / alone <= 8


def test_nothing_is_claimed_without_ceilings_or_for_other_figures() -> None:
    shape = Shape.from_config(CONFIG)
    case = Case("s", "1", "decode_tokens_per_s", (Request([1], 2),))
    assert bound(case, shape, {}, 1e5, "bf16") is None
    assert bound(Case("s", "1", "ttft_p50_s", case.requests), shape, CEILINGS, 1e5, "bf16") is None
