"""Speculation changes nothing but the number of steps: outputs token for token those of plain decoding, greedy and sampled.

Proposers that are always, never and sometimes right stand in for the real ones where it matters how right they are.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minfer import LLM, SamplingParams
from minfer.engine.outputs import CompletionOutput
from minfer.errors import ConfigError
from minfer.models import FINAL
from minfer.sampling import Sampler
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative import DraftRow, accepted
from minfer.speculative.policy import Bar, StepCosts
from minfer.structured_outputs import StructuredOutputsParams

BASE: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 256, "kv_cache_memory": 2**22}
SPECULATIVE: dict[str, Any] = {"speculative": "ngram", "num_draft_tokens": 5, "ngram_min_match": 1, "adaptive_drafts": False}


def prompt_of(length: int, family: int) -> list[int]:
    """Full of repetitions, so that prompt lookup has something to find."""
    rng = random.Random(family)
    words = [[rng.randrange(3, 500) for _ in range(rng.randrange(1, 6))] for _ in range(6)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(words)
    return tokens[:length]


PARAMS = (
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.3, seed=7, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, frequency_penalty=0.4, presence_penalty=0.1, max_tokens=24, min_tokens=5, logprobs=2),
    SamplingParams(temperature=0.5, seed=5, n=2, max_tokens=10, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=30, logit_bias={17: 4.0, 18: 3.5}, bad_word_token_ids=((17, 18),)),
)

Ask = tuple[int, int, int]  # prompt length, family, which of PARAMS


def said(completion: CompletionOutput) -> tuple[Any, ...]:
    scores = [{t: pytest.approx(s.logprob, abs=1e-5) for t, s in p.items()} for p in completion.logprobs or []]
    return completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason, scores


@pytest.fixture(scope="module", params=["reference", "cpu"])
def plain(request: pytest.FixtureRequest, tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), prefix_caching=False, backend=request.param, **BASE)


@pytest.fixture(scope="module")
def stranger(make_checkpoint: Any) -> Path:
    """A model of the same vocabulary and other weights, whose guesses are mostly wrong."""
    return make_checkpoint("llama", seed=5)  # type: ignore[no-any-return]


def ask(llm: LLM, batch: Sequence[Ask]) -> list[list[CompletionOutput]]:
    prompts = [{"prompt_token_ids": prompt_of(length, family)} for length, family, _ in batch]
    outputs = llm.generate(prompts, [PARAMS[kind] for *_, kind in batch], use_tqdm=False)
    assert llm.engine.core.scheduler.pool.num_used == 0
    return [output.outputs for output in outputs]


def drawn_at_a_boundary(ours: CompletionOutput, theirs: CompletionOutput, backend: str) -> bool:
    """Whether they part at tokens of neighbouring ids, on the backend whose matrix products round by the number of rows.

    A draw takes the id in whose share of [0, 1) a random number falls. One draw in ten thousand falls within float32's rounding of
    a bound between two of 500 shares, and then the neighbour is as right. The compiled kernels round alike, and get no such leave.
    """
    parted = next(((a, b) for a, b in zip(ours.token_ids, theirs.token_ids, strict=False) if a != b), (0, 0))
    return backend == "reference" and abs(parted[0] - parted[1]) == 1


asks = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 2), st.integers(0, len(PARAMS) - 1)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(
    batch=asks,
    block_size=st.sampled_from([1, 4, 16]),
    budget=st.sampled_from([8, 17, 2048]),
    seats=st.sampled_from([1, 3, 8]),
    tight=st.booleans(),
    prefix_caching=st.booleans(),
    adaptive=st.booleans(),
    top_k=st.sampled_from([1, 2, 4]),
    drafter=st.sampled_from(["ngram", "stranger", "twin", "skip", "eagle", "eagle3", "medusa", "redrafter"]),
)
def test_outputs_are_those_of_plain_decoding(
    plain: LLM,
    tiny_llama: Path,
    stranger: Path,
    head_folders: dict[str, Path],
    batch: list[Ask],
    block_size: int,
    budget: int,
    seats: int,
    tight: bool,
    prefix_caching: bool,
    adaptive: bool,
    top_k: int,
    drafter: str,
) -> None:
    draft_model = {"ngram": None, "skip": None, "stranger": stranger, "twin": tiny_llama, **head_folders}[drafter]
    skipping = {"speculative": "skip", "skip_layers": "1"} if drafter == "skip" else {}
    llm = LLM(
        str(tiny_llama),
        **{
            **BASE,
            **SPECULATIVE,
            **({"speculative": "draft", "draft_model": str(draft_model)} if draft_model else skipping),
            "backend": plain.engine.config.backend,
            "adaptive_drafts": adaptive,
            "draft_top_k": top_k if drafter in ("eagle", "eagle3", "medusa") else 1,
            "max_model_len": 160,
            "block_size": block_size,
            "max_num_batched_tokens": budget,
            "max_num_seqs": seats,
            "prefix_caching": prefix_caching,
            "kv_cache_memory": (1 + bool(draft_model)) * 2 * 2 * 2 * 16 * 4 * (192 if tight else 2048),
        },
    )
    for ours, theirs in zip(ask(llm, batch), (ask(plain, [one])[0] for one in batch), strict=True):
        for completion, expected in zip(ours, theirs, strict=True):
            assert said(completion) == said(expected) or drawn_at_a_boundary(completion, expected, plain.engine.config.backend)


def test_repetition_is_found_and_saves_steps(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), **BASE, **SPECULATIVE)
    (first,) = ask(llm, [(60, 0, 0)])
    speculation, steps = llm.engine.core.speculation, llm.engine.core.scheduler.stats.num_steps
    assert speculation is not None
    stats = speculation.stats
    assert stats.num_accepted_tokens > 0
    assert sum(stats.accepted_at) == stats.num_accepted_tokens <= stats.num_draft_tokens
    assert steps == len(first[0].token_ids) - stats.num_accepted_tokens
    assert stats.mean_accepted_length == 1 + stats.num_accepted_tokens / stats.num_drafts


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 4}, {"block_size": 1}], ids=str)
def test_a_draft_model_that_is_the_model_is_always_right(tiny_llama: Path, settings: dict[str, Any]) -> None:
    """Whatever was rolled back, shared, chunked or found in the cache: any hole in the draft's own KV would show as a wrong guess."""
    options = {**BASE, **SPECULATIVE, "speculative": "draft", "draft_model": str(tiny_llama), **settings}
    llm = LLM(str(tiny_llama), **options)
    batch = [(50, 0, 0), (90, 1, 1), (33, 1, 2), (17, 2, 3), (40, 2, 4)]
    for _ in range(2):
        ask(llm, batch)
        stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
        assert stats.num_accepted_tokens == stats.num_draft_tokens > 0
    assert llm.engine.core.scheduler.stats.num_prefix_hits > 0


@pytest.fixture(scope="module")
def idle_layer(make_checkpoint: Any) -> Path:
    """A model whose middle layer adds nothing."""
    folder: Path = make_checkpoint("llama", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 4}, {"block_size": 1}, {"graphs": False}], ids=str)
def test_a_skipped_layer_that_adds_nothing_leaves_every_draft_right(idle_layer: Path, settings: dict[str, Any]) -> None:
    """The drafts' KV stands in the target's own blocks: a hole, or a draft's leftovers read by the target, would show."""
    plain = LLM(str(idle_layer), **BASE, prefix_caching=False)
    llm = LLM(str(idle_layer), **{**BASE, **SPECULATIVE, "speculative": "skip", "skip_layers": "1", **settings})
    batch = [(50, 0, 0), (90, 1, 1), (33, 1, 2), (17, 2, 3), (40, 2, 4)]
    for _ in range(2):
        for ours, theirs in zip(ask(llm, batch), (ask(plain, [one])[0] for one in batch), strict=True):
            assert [said(completion) for completion in ours] == [said(completion) for completion in theirs]
        stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
        assert stats.num_accepted_tokens == stats.num_draft_tokens > 0
    assert llm.engine.core.scheduler.stats.num_prefix_hits > 0


@pytest.mark.parametrize("layers", ["3", "0-2", "1-", "x", "2-1"])
def test_layers_that_can_not_be_skipped_are_refused(idle_layer: Path, layers: str) -> None:
    with pytest.raises(ConfigError, match="skip_layers"):
        LLM(str(idle_layer), **BASE, speculative="skip", skip_layers=layers)
    with pytest.raises(ConfigError, match="skip_layers"):
        LLM(str(idle_layer), **BASE, skip_layers="1")


def test_a_draft_model_that_does_not_fit_is_refused(tiny_llama: Path, make_checkpoint: Any) -> None:
    options = {**BASE, "speculative": "draft"}
    with pytest.raises(ConfigError, match="vocabulary of 300 tokens"):
        LLM(str(tiny_llama), **options, draft_model=str(make_checkpoint("llama", vocab_size=300)))
    with pytest.raises(ConfigError, match="set --max-model-len 64 or less"):
        LLM(str(tiny_llama), **options, draft_model=str(make_checkpoint("llama", max_position_embeddings=64)))
    with pytest.raises(ConfigError, match="each needs the other"):
        LLM(str(tiny_llama), **options)
    with pytest.raises(ConfigError, match="each needs the other"):
        LLM(str(tiny_llama), **BASE, draft_model=str(tiny_llama))


def test_the_cost_of_decode_steps_is_measured_and_prompt_chunks_are_left_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_llama), **BASE, **SPECULATIVE, max_prefill_chunk=7)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(StepCosts, "ran", lambda self, sequences, drafts, seconds: seen.append((sequences, drafts)) or 0.0)
    ask(llm, [(60, 0, 0)])
    stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
    assert len(seen) == 23 - stats.num_accepted_tokens
    assert {sequences for sequences, _ in seen} == {1}
    assert sum(drafts for _, drafts in seen) == stats.num_draft_tokens


class Oracle:
    """Guesses from a known continuation: all of it right, none of it, or every third token wrong."""

    after: Sequence[int] = ()
    tells_chances = False

    def __init__(self, truth: list[int], kind: str) -> None:
        self.truth, self.kind = truth, kind

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None: ...

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None: ...

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        if self.kind == "hostile":  # ends of text, padding ids, ids beside the grammar, more of them than there is room for
            return [[2, 511, 0, 2, *range(50)][:count] for count in counts]
        wrong = {"always": lambda n: False, "never": lambda n: True, "sometimes": lambda n: n % 3 == 2}[self.kind]
        drafts = []
        for request, count in zip(requests, counts, strict=True):
            at = len(request.output_token_ids)
            drafts.append([(token + 1) % 500 if wrong(at + i) else token for i, token in enumerate(self.truth[at : at + count])])
        return drafts


@pytest.mark.parametrize("kind", ["always", "never", "sometimes", "hostile"])
@pytest.mark.parametrize("params", PARAMS[:4], ids=str)
def test_a_proposer_may_be_right_or_wrong(plain: LLM, tiny_llama: Path, kind: str, params: SamplingParams) -> None:
    prompt = {"prompt_token_ids": prompt_of(40, 1)}
    truth = plain.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    llm = LLM(str(tiny_llama), **BASE, **SPECULATIVE)
    llm.engine.core.speculation.sources[0].proposer = Oracle(truth.token_ids, kind)  # type: ignore[union-attr]
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert said(output.outputs[0]) == said(truth)
    stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
    rate = stats.num_accepted_tokens / stats.num_draft_tokens
    assert (rate == 0) if kind == "never" else (rate == 1) if kind == "always" else (kind == "hostile" or 0 < rate < 1)


@pytest.mark.parametrize("drafter", ["ngram", "twin", "skip", "eagle", "eagle3", "eagle3 tree", "medusa", "medusa tree", "redrafter"])
def test_stop_strings_and_grammars_hold_with_every_proposer(tiny_llama: Path, head_folders: dict[str, Path], drafter: str) -> None:
    asked: dict[str, Any] = {"speculative": drafter} if drafter in ("ngram", "skip") else {"speculative": "draft"}
    if asked["speculative"] == "draft":
        asked["draft_model"] = str(tiny_llama if drafter == "twin" else head_folders[drafter.removesuffix(" tree")])
        asked["draft_top_k"] = 3 if drafter.endswith("tree") else 1
    plain = LLM(str(tiny_llama), **BASE)
    llm = LLM(str(tiny_llama), **{**BASE, **SPECULATIVE, **asked, "max_num_batched_tokens": 24, "max_num_seqs": 4, "block_size": 4})
    form = StructuredOutputsParams(regex="(the|fox|[0-9]{2}){3,8}")
    params = [
        SamplingParams(temperature=0, max_tokens=30, stop=["e", "o"], ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=30, structured_outputs=form),
        SamplingParams(temperature=0.9, seed=4, max_tokens=30, structured_outputs=form),
        SamplingParams(temperature=0.7, seed=9, max_tokens=30, stop=["a"], include_stop_str_in_output=True, ignore_eos=True),
    ]
    prompts = ["The quick brown fox", "1 2 3 1 2 3 1 2", "1 2 3 1 2 3 1 2", "a table names them in order"]
    for _ in range(2):  # the second time from the prefix cache
        ours, theirs = (engine.generate(prompts, params, use_tqdm=False) for engine in (llm, plain))
        for one, other in zip(ours, theirs, strict=True):
            assert said(one.outputs[0]) == said(other.outputs[0])
    assert llm.engine.core.speculation.stats.num_draft_tokens > 0  # type: ignore[union-attr]
    assert llm.engine.core.scheduler.pool.num_used == 0


def test_a_stop_string_in_the_middle_of_right_drafts_ends_the_text_there() -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory": 2**25}
    prompt, params = "1, 2, 3, 4, 5, 6,", SamplingParams(temperature=0, max_tokens=24)
    slow, fast = LLM("smollm2-135m", **options), LLM("smollm2-135m", **options, **SPECULATIVE)
    truth = slow.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    fast.engine.core.speculation.sources[0].proposer = Oracle(truth.token_ids, "always")  # type: ignore[union-attr]
    middle = truth.text[len(truth.text) // 2 :][:2]
    for stop in (SamplingParams(temperature=0, max_tokens=24, stop=[middle], include_stop_str_in_output=keep) for keep in (False, True)):
        ours, theirs = (llm.generate(prompt, stop, use_tqdm=False)[0].outputs[0] for llm in (fast, slow))
        assert said(ours) == said(theirs)
        assert ours.stop_reason == middle
    assert fast.engine.core.scheduler.pool.num_used == 0


class Witness(Oracle):
    """Drafts as the oracle does, and keeps what it is shown of each token that stands."""

    after: Sequence[int] = (1, FINAL)

    def __init__(self, truth: list[int], kind: str) -> None:
        super().__init__(truth, kind)
        self.seen: dict[int, list[torch.Tensor]] = {}

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        for item, own in zip(scheduled, rows, strict=True):
            assert len(own) == item.request.num_computed_tokens - item.start
            for index, row in enumerate(own):
                self.seen[item.start + index] = [state[row].clone() for state in states]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_proposer_sees_the_inner_states_of_the_tokens_that_stand(tiny_llama: Path, backend: str) -> None:
    from transformers import AutoModelForCausalLM

    options = {**BASE, **SPECULATIVE, "backend": backend, "max_prefill_chunk": 7}
    prompt, params = prompt_of(40, 1), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    truth = LLM(str(tiny_llama), **options).generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minfer.engine.core._proposers", lambda *arguments: [Witness(truth, "sometimes")])
        llm = LLM(str(tiny_llama), **options)
    witness = llm.engine.core.speculation.sources[0].proposer  # type: ignore[union-attr]
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + truth]), output_hidden_states=True).hidden_states
    assert isinstance(witness, Witness)
    assert sorted(witness.seen) == list(range(max(witness.seen) + 1))
    assert max(witness.seen) >= len(prompt) + 10
    for position, (after_one, final) in witness.seen.items():
        assert (after_one - expected[1][0, position]).abs().max() < 1e-4
        assert (final - expected[-1][0, position]).abs().max() < 1e-4


class Now(Oracle):
    """Has an idea at every third token only."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        drafts = super().propose(requests, counts, bar)
        return [[] if request.num_tokens % 3 else own[:1] for request, own in zip(requests, drafts, strict=True)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_who_the_first_has_no_idea_for_is_the_next_ones(tiny_llama: Path, adaptive: bool) -> None:
    options = {**BASE, **SPECULATIVE, "adaptive_drafts": adaptive, "max_prefill_chunk": 7}
    prompt, params = {"prompt_token_ids": prompt_of(40, 1)}, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    truth = LLM(str(tiny_llama), **BASE).generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    first, second = Now(truth, "always"), Witness(truth, "never")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minfer.engine.core._proposers", lambda *arguments: [first, second])
        llm = LLM(str(tiny_llama), **options)
    assert llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == truth
    speculation = llm.engine.core.speculation
    assert speculation is not None
    lookup, dear = speculation.sources
    if not adaptive:
        assert speculation.stats.num_accepted_tokens >= 10
        assert lookup._usual.rate > 0.8
        assert dear._usual.rate < 0.2, "of its own drafts only"
        assert sorted(second.seen) == list(range(max(second.seen) + 1)), "it sees what others' drafts brought, too"


def test_lookup_first_and_a_model_where_it_finds_nothing(tiny_llama: Path, make_checkpoint: Any) -> None:
    small = make_checkpoint("llama", num_hidden_layers=1)
    options = {**BASE, "speculative": "ngram+draft", "draft_model": str(small), "num_draft_tokens": 3, "adaptive_drafts": False}
    llm, plain = LLM(str(tiny_llama), **options), LLM(str(tiny_llama), **BASE)
    prompts: list[Any] = [{"prompt_token_ids": prompt_of(60, 0)}, {"prompt_token_ids": prompt_of(31, 1)}]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    ours, theirs = (engine.generate(prompts, params, use_tqdm=False) for engine in (llm, plain))
    assert [said(one.outputs[0]) for one in ours] == [said(one.outputs[0]) for one in theirs]
    names = [type(source.proposer).__name__ for source in llm.engine.core.speculation.sources]  # type: ignore[union-attr]
    assert names == ["NgramProposer", "DraftModelProposer"]
    assert all(source._usual.tried > 2 for source in llm.engine.core.speculation.sources)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="each needs the other"):
        LLM(str(tiny_llama), **{**options, "draft_model": None})


@pytest.mark.parametrize(
    ("drafts", "drawn", "count"), [([], [5], 0), ([1, 2], [1, 2, 9], 2), ([1, 2], [1, 3, 9], 1), ([1, 2], [2, 2, 9], 0)]
)
def test_drafts_stand_up_to_the_first_wrong_one(drafts: list[int], drawn: list[int], count: int) -> None:
    assert accepted(drafts, (), drawn) == list(range(1, count + 1))


@pytest.mark.parametrize("draft", [0, 3, 7])
def test_a_verified_position_has_the_models_distribution(draft: int) -> None:
    """Chi-square over 100,000 seeds: the token at a drafted position, accepted or not, is distributed as the logits say.

    Position 0 is the draft's own, position 1 the one behind it, whose logits here are others.
    """
    size, count = 8, 100_000
    torch.manual_seed(draft)
    logits = torch.randn(2, size) * 1.5
    params = SamplingParams(temperature=0.9, max_tokens=10)
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    sampler = Sampler(size)
    for start in range(0, count, 5000):
        requests = [
            Request(request_id=str(seed), prompt_token_ids=[1, 2], params=params, max_total_tokens=12, seed=seed * 7919)
            for seed in range(start, start + 5000)
        ]
        rows = [row for request in requests for row in (request, DraftRow(request, [draft]))]
        tokens = sampler.sample(logits.repeat(5000, 1), rows).token_ids
        for index in range(5000):
            drawn = tokens[2 * index : 2 * index + 2]
            first[drawn[0]] += 1
            if accepted([draft], (), drawn):
                second[drawn[1]] += 1
    for row, counts in enumerate((first, second)):
        expected = torch.softmax(logits[row].double() / 0.9, -1) * sum(counts.values())
        chi_square = sum((counts[token] - float(e)) ** 2 / float(e) for token, e in enumerate(expected))
        assert chi_square < 29.9  # 7 degrees of freedom: one in 10,000, and the seeds are fixed


def test_an_unknown_method_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="speculative must be one of none, ngram, draft, skip"):
        LLM(str(tiny_llama), **BASE, speculative="crystal-ball")
