"""Drafts that branch: the likeliest nodes are drafted, and whatever the tree and wherever the right ones stand, outputs are plain ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speculative.test_speculation import BASE, PARAMS, SPECULATIVE, Oracle, prompt_of, said

from minfer import LLM, SamplingParams
from minfer.errors import ConfigError
from minfer.scheduler import Request
from minfer.speculative import DraftTree, accepted, trunk, way
from minfer.speculative.policy import NO_BAR, Bar
from minfer.speculative.tree import Opinion, Sketch

chances = st.lists(st.floats(0.05, 0.6), min_size=1, max_size=3)


@given(places=st.lists(chances, min_size=1, max_size=3), budget=st.integers(1, 12), everywhere=st.booleans())
def test_the_likeliest_nodes_are_drafted(places: list[list[float]], budget: int, everywhere: bool) -> None:
    sketch = Sketch(budget, Bar(0.01, 0.01))
    for place, owns in enumerate(places):
        sketch.add([(10 * place + number, own) for number, own in enumerate(owns)])
    tree = sketch.tree(budget, everywhere)
    # By brute force: every way through the places, with the product along it.
    nodes = {}
    for depth in range(1, len(places) + 1):
        for numbers in itertools.product(*(range(len(owns)) for owns in places[:depth])):
            if everywhere or not any(numbers[:-1]):
                chance = 1.0
                for place, number in enumerate(numbers):
                    chance *= places[place][number]
                nodes[tuple(10 * place + number for place, number in enumerate(numbers))] = chance
    best = sorted((chance for chance in nodes.values() if chance >= 0.01), reverse=True)[:budget]
    ways = [tuple(tree.tokens[draft - 1] for draft in way(number, tree.parents)) for number in range(1, len(tree.tokens) + 1)]
    assert len(set(ways)) == len(ways)
    assert sorted((nodes[one] for one in ways), reverse=True) == pytest.approx(best)
    assert all(parent < number for number, parent in enumerate(tree.parents, 1))
    straight = trunk(len(tree.tokens), tree.parents)
    assert tree.parents[:straight] == list(range(straight))
    assert straight >= min(1, len(ways))
    assert straight not in tree.parents[straight:], "what follows the trunk's end is part of the trunk"


def test_a_chain_ends_where_it_is_not_worth_it() -> None:
    sketch = Sketch(8, Bar(0.3, 0.3))
    for own in (0.9, 0.5, 0.5):
        assert sketch.wants_more
        sketch.add([(7, own)])
    assert not sketch.wants_more
    assert sketch.chain() == [7, 7]


def test_what_is_made_is_checked_where_another_would_not_pay() -> None:
    sketch = Sketch(8, Bar(check=0.2, another=0.5))
    assert sketch.wants_more
    sketch.add([(7, 0.4)])
    assert not sketch.wants_more
    assert sketch.chain() == [7]


def test_a_place_that_can_not_be_among_the_best_is_not_asked_for() -> None:
    sketch = Sketch(2, NO_BAR)
    sketch.add([(1, 0.4), (2, 0.3), (3, 0.2)])
    assert sketch.wants_more  # behind 1 there may be one of 0.4
    sketch.add([(4, 0.5), (5, 0.2)])
    assert not sketch.wants_more
    assert sketch.tree(2, everywhere=False) == DraftTree([1, 2], [0, 0])


def test_opinions_are_a_softmax_over_what_the_head_knows() -> None:
    logits, ids = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([5, 8, 9])
    opinion = Opinion(logits, ids, 2)
    likely = torch.softmax(logits, -1).tolist()
    greedy, drawn = (Asker(SamplingParams(temperature=t)) for t in (0, 1))
    assert opinion.guesses(0, 8, greedy) == [(8, pytest.approx(likely[0][1])), (9, pytest.approx(likely[0][2]))]
    assert opinion.guesses(0, 9, greedy) == [(9, pytest.approx(likely[0][2])), (8, pytest.approx(likely[0][1]))]
    assert opinion.guesses(0, 9, drawn)[0] == (9, 1.0)
    assert opinion.guesses(1, 77, greedy) == [(77, pytest.approx(likely[1][1])), (5, pytest.approx(likely[1][0]))]  # a bias had it said


class Asker:
    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = 0
        self.prompt_token_ids = self.output_token_ids = self.eos_token_ids = ()


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [
        ([4, 9, 9, 9, 9, 9], []),
        ([1, 2, 3, 9, 9, 9], [1, 2]),  # the trunk: 1 2
        ([5, 9, 9, 6, 7, 9], [3, 4]),  # a branch: 5 6
        ([1, 6, 9, 9, 9, 9], [1, 5]),  # one that leaves the trunk
        ([1, 5, 9, 9, 9, 9], [1]),  # 5 is a guess for the place before
    ],
)
def test_the_walk_through_the_tree_is_that_of_the_output(drawn: list[int], kept: list[int]) -> None:
    assert accepted([1, 2, 5, 6, 6], [0, 1, 0, 3, 1], drawn) == kept


class Grower(Oracle):
    """Trees of random shape, in which the right tokens stand at random places, as far as they do."""

    def __init__(self, truth: list[int]) -> None:
        super().__init__(truth, "always")
        self.random = random.Random(4)
        self.branched = 0

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int] | DraftTree]:
        return [self._tree(self.truth[len(request.output_token_ids) :], count) for request, count in zip(requests, counts, strict=True)]

    def _tree(self, truth: list[int], count: int) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        depth, right = {0: 0}, {0: True}
        for number in range(1, count + 1):
            parent = self.random.choice([0, *range(1, number)][-3:])
            place = depth[parent]
            taken = {token for token, other in zip(tokens, parents, strict=True) if other == parent}
            token = truth[place] if right[parent] and place < len(truth) and self.random.random() < 0.6 else self.random.randrange(3, 500)
            if token in taken:
                token = next(other for other in range(3, 500) if other not in taken)
            depth[number], right[number] = place + 1, right[parent] and place < len(truth) and token == truth[place]
            tokens.append(token)
            parents.append(parent)
        self.branched += parents != list(range(count))
        return DraftTree(tokens, parents)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "settings", [{"block_size": 1}, {"block_size": 4, "kv_cache_dtype": "int8"}, {"max_num_batched_tokens": 7}], ids=str
)
@pytest.mark.parametrize("params", PARAMS[:4], ids=str)
def test_any_tree_gives_the_plain_output(tiny_llama: Path, backend: str, settings: dict[str, Any], params: SamplingParams) -> None:
    check_trees(tiny_llama, {**BASE, "max_num_seqs": 4, "backend": backend, **settings}, backend, params)


def test_any_tree_gives_the_plain_output_on_gpu_kernels(tiny_llama: Path) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {**BASE, "max_num_seqs": 4, "backend": "triton", "block_size": 4, "shared_prefix": 16, "device": device}
    llm = check_trees(tiny_llama, options, "reference", SamplingParams(temperature=0, max_tokens=14, ignore_eos=True))
    assert llm.engine.core.runner.builder.keys_saved > 0, "the branches of a tree share their request's context"


def check_trees(tiny_llama: Path, options: dict[str, Any], plain: str, params: SamplingParams) -> LLM:
    prompt = {"prompt_token_ids": prompt_of(40, 1)}
    truth = LLM(str(tiny_llama), **{**options, "backend": plain}).generate(prompt, params, use_tqdm=False)[0].outputs[0]
    grower = Grower(truth.token_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minfer.engine.core._proposers", lambda *arguments: [grower])
        patch.setattr("minfer.engine.core._builder", wide_builder)
        llm = LLM(str(tiny_llama), **options, **SPECULATIVE)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert said(output.outputs[0]) == said(truth)
    stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
    assert grower.branched > 2
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert llm.engine.core.scheduler.pool.num_used == 0
    return llm


def wide_builder(loaded: Any, adapters: int = 0) -> Any:
    from minfer.runner import BatchBuilder

    config = loaded.config
    sizes = (config.max_num_batched_tokens, 64, loaded.max_model_len, config.block_size)
    return BatchBuilder(*sizes, loaded.device, config.num_draft_tokens, adapters, shared_prefix=config.shared_prefix)


@pytest.mark.parametrize("name", ["eagle", "eagle3", "medusa"])
def test_heads_draft_trees_whose_trunk_is_their_chain(tiny_llama: Path, head_folders: dict[str, Path], name: str) -> None:
    """A head drafts its own best chain first, and others beside it; right branches move to where their positions are."""
    proposals = []
    for top_k in (1, 3):
        options = {**BASE, **SPECULATIVE, "speculative": "draft", "draft_model": str(head_folders[name]), "num_draft_tokens": 6}
        llm = LLM(str(tiny_llama), **options, draft_top_k=top_k)
        proposer = llm.engine.core.speculation.sources[0].proposer  # type: ignore[union-attr]
        propose, seen = proposer.propose, {}

        def watched(requests: Any, counts: Any, bar: Bar, propose: Any = propose, seen: Any = seen) -> Any:
            drafts = propose(requests, counts, bar)
            seen.update((tuple(request.token_ids), said) for request, said in zip(requests, drafts, strict=True))
            return drafts

        proposer.propose = watched  # type: ignore[method-assign]
        llm.generate({"prompt_token_ids": prompt_of(30, 2)}, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
        proposals.append(seen)
    chains, trees = proposals
    both = [(chains[key], trees[key]) for key in chains.keys() & trees.keys()]
    assert len(both) > 10
    branched = 0
    for chain, tree in both:
        if not chain:  # at the end of the text there is no room
            continue
        straight = trunk(len(tree.tokens), tree.parents)
        assert tree.tokens[:straight] == chain[:straight]
        branched += straight < len(tree.tokens)
    assert branched or name == "eagle"  # whose weights happen to be sure of themselves


def test_trees_where_nobody_drafts_them_are_refused(tiny_llama: Path, head_folders: dict[str, Path]) -> None:
    for options in ({}, {"speculative": "ngram"}):
        with pytest.raises(ConfigError, match="draft_top_k"):
            LLM(str(tiny_llama), **BASE, **options, draft_top_k=2)
    for folder in (tiny_llama, head_folders["redrafter"]):
        with pytest.raises(ConfigError, match="draft_top_k"):
            LLM(str(tiny_llama), **BASE, speculative="draft", draft_model=str(folder), draft_top_k=2)
    with pytest.raises(ConfigError, match="more than the"):
        LLM(str(tiny_llama), **BASE, speculative="draft", draft_model=str(head_folders["eagle3"]), draft_top_k=500)
