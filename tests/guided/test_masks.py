"""Masks against the definition: after any prefix of a valid text, exactly those tokens may come that keep a valid text in reach."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from minfer.guided import Grammar, GrammarCompiler, GrammarMasks
from minfer.sampling import Sampler
from minfer.sampling_params import SamplingParams
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

PADDED = 544  # the logits are wider than the tokenizer's 512 ids


@dataclass(eq=False)
class Row:
    params: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    seed: int = 0
    eos_token_ids: tuple[int, ...] = (2,)

    @property
    def position(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer)


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def compiler(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [2], backend=request.param)


def row(compiler: GrammarCompiler, output: list[int], seed: int = 0, **wish: Any) -> Row:
    params = SamplingParams(structured_outputs=wish, grammar=compiler.compile(StructuredOutputsParams(**wish)))
    return Row(params, output, seed=seed)


def allowed(masks: GrammarMasks, rows: list[Any]) -> list[set[int]]:
    logits = torch.randn(len(rows), PADDED)
    before = logits.clone()
    masks(logits, rows)
    kept = logits > -torch.inf
    assert torch.equal(logits[kept], before[kept])
    return [set(line.nonzero()[:, 0].tolist()) for line in kept]


def could_become(text: bytes) -> bool:
    """Prefixes of `"[ab]{1,3}"` by the definition, without a parser."""
    full = re.compile(rb'"[ab]{1,3}"')
    tails = [b"", b'"', b'a"', b'aa"', b'aaa"', b'"a"']
    return any(full.fullmatch(text + tail) for tail in tails)


@pytest.mark.parametrize("text", ["", '"', '"a', '"ab', '"aba', '"b"'])
def test_exactly_the_tokens_that_keep_a_valid_text_in_reach(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str) -> None:
    output = tokenizer.encode(text, add_special_tokens=False)
    expected = {t for t in range(512) if not tokenizer.is_special(t) and could_become(text.encode() + tokenizer.token_bytes(t))}
    if text == '"b"':
        expected = {2}
    (found,) = allowed(GrammarMasks(), [row(compiler, output, regex='"[ab]{1,3}"')])
    assert found == expected and expected


def test_rows_that_ask_for_nothing_stay_bit_equal(compiler: GrammarCompiler) -> None:
    plain = Row(SamplingParams())
    logits = torch.randn(3, PADDED)
    before = logits.clone()
    GrammarMasks()(logits, [plain, row(compiler, [], choice=["yes", "no"]), plain])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert not torch.equal(logits[1], before[1])


def test_a_row_is_masked_alike_alone_and_in_a_crowd(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    texts = ["{", '{"a', "[1", "", "[[", '{"x": 1, ']
    rows = [row(compiler, tokenizer.encode(text, add_special_tokens=False), n, json={}) for n, text in enumerate(texts)]
    alone = [allowed(GrammarMasks(), [one])[0] for one in rows]
    assert allowed(GrammarMasks(), rows) == alone


def test_outputs_may_shrink_and_be_replaced(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Rejected drafts take tokens back, also those behind the end of the form."""
    masks, pattern = GrammarMasks(), "abc|xyz"
    one = row(compiler, [], regex=pattern)
    for text in ["ab", "", "xyz", "xy", "abc", "a", "x"]:
        one.output_token_ids[:] = [t for c in text for t in tokenizer.encode(c, add_special_tokens=False)]
        fresh = row(compiler, list(one.output_token_ids), seed=99, regex=pattern)
        assert allowed(masks, [one]) == allowed(GrammarMasks(), [fresh]), text
    one.output_token_ids[:] = [*tokenizer.encode("abc", add_special_tokens=False), 2, 2]
    assert allowed(masks, [one]) == [{2}]  # whoever ignores the end gets more of it
    del one.output_token_ids[-4:]
    assert allowed(masks, [one]) != [{2}]


def test_masks_filled_beside_the_model_are_the_same(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    masks = GrammarMasks()
    rows = [row(compiler, [], 0, json={}), Row(SamplingParams()), row(compiler, [], 1, choice=["yes", "no"])]
    for text in ["", "y"]:
        rows[2].output_token_ids[:] = tokenizer.encode(text, add_special_tokens=False)
        expected = allowed(GrammarMasks(), rows)
        masks.begin(rows)
        assert allowed(masks, rows) == expected
    masks.begin(rows)  # of a step that failed: nobody asks for these
    rows[2].output_token_ids[:] = tokenizer.encode("no", add_special_tokens=False)
    assert allowed(masks, rows[2:]) == [{2}]
    assert masks.num_masks == 2 * 2 + 1


def test_a_dropped_matcher_is_made_anew(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    masks = GrammarMasks(spare_matchers=0)
    first = row(compiler, tokenizer.encode('{"a', add_special_tokens=False), 1, json={"type": "object"})
    expected = allowed(masks, [first])
    for seed in range(5):
        allowed(masks, [row(compiler, [], seed, choice=["x"])])
    assert allowed(masks, [first]) == expected
    assert len(masks._followers) == 1


def test_a_matcher_at_its_limit_ends_its_row_only(compiler: GrammarCompiler, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = row(compiler, [5, 6, 7], 1, choice=["zz"]), row(compiler, [], 2, choice=["yes"])
    masks = GrammarMasks()
    output = Sampler(PADDED, processors=[masks]).sample(torch.randn(2, PADDED), [bad, good])
    assert output.failed == [0]
    assert "a grammar stopped" in caplog.text
    assert isinstance(bad.params.grammar, Grammar) and bad.params.grammar.spoiled
    assert compiler.compile(StructuredOutputsParams(choice=["zz"])) is not bad.params.grammar
    assert compiler.compile(StructuredOutputsParams(choice=["yes"])) is good.params.grammar
