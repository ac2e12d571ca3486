"""What a request says doesn't depend on how it was run: chunks, blocks, neighbours, arrival, prefix cache, preemption.

Float32 and a tiny random model; outputs are compared token for token with each prompt run alone in one piece.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer import LLM, SamplingParams

BASE: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 256, "kv_cache_memory": 2**22}


def prompt_of(length: int, family: int) -> list[int]:
    """Prompts of a family begin alike, so that prefixes can be shared."""
    rng = random.Random(family)
    return [rng.randrange(3, 500) for _ in range(length)]


def params_of(kind: int) -> SamplingParams:
    return (
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=3, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=6, ignore_eos=True),
    )[kind]


Ask = tuple[int, int, int]  # prompt length, family, kind of sampling
_alone: dict[Ask, list[list[int]]] = {}


@pytest.fixture(scope="module", params=["reference", "cpu"])
def reference(request: pytest.FixtureRequest, tiny_llama: Path) -> LLM:
    """Each prompt is run alone, in one piece, by the same backend as the engine under test."""
    _alone.clear()
    return LLM(str(tiny_llama), prefix_caching=False, backend=request.param, **BASE)


def settings_of(reference: LLM) -> dict[str, Any]:
    return {**BASE, "backend": reference.engine.config.backend}


def expected(reference: LLM, ask: Ask) -> list[list[int]]:
    if ask not in _alone:
        length, family, kind = ask
        (output,) = reference.generate({"prompt_token_ids": prompt_of(length, family)}, params_of(kind), use_tqdm=False)
        _alone[ask] = [completion.token_ids for completion in output.outputs]
    return _alone[ask]


asks = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=asks,
    block_size=st.sampled_from([1, 4, 16, 64]),
    budget=st.sampled_from([8, 17, 64, 2048]),
    chunk=st.sampled_from([None, 3, 16]),
    seats=st.sampled_from([1, 3, 8]),
    tight=st.booleans(),
    prefix_caching=st.booleans(),
    late=st.integers(0, 5),
    overlap=st.sampled_from(["on", "off"]),
)
def test_outputs_do_not_depend_on_how_they_were_computed(
    reference: LLM,
    tiny_llama: Path,
    batch: list[Ask],
    block_size: int,
    budget: int,
    chunk: int | None,
    seats: int,
    tight: bool,
    prefix_caching: bool,
    late: int,
    overlap: str,
) -> None:
    """`tight` gives the pool room for one full sequence only, which forces preemption; `late` requests arrive mid-run."""
    bytes_per_token = 2 * 2 * 2 * 16 * 4
    llm = LLM(
        str(tiny_llama),
        **{
            **settings_of(reference),
            "max_model_len": 160,
            "block_size": block_size,
            "max_num_batched_tokens": budget,
            "max_prefill_chunk": chunk,
            "max_num_seqs": seats,
            "prefix_caching": prefix_caching,
            "overlap": overlap,
            "kv_cache_memory": bytes_per_token * (192 if tight else 2048),
        },
    )
    engine, scheduler = llm.engine, llm.engine.core.scheduler
    done: dict[str, list[list[int]]] = {}
    for index, (length, family, kind) in enumerate(batch):
        engine.add_request(str(index), prompt_of(length, family), params_of(kind), kind="final")
        if index >= len(batch) - late:
            for output in engine.step():
                done[output.request_id] = [completion.token_ids for completion in output.outputs]
    while engine.has_unfinished_requests:
        for output in engine.step():
            done[output.request_id] = [completion.token_ids for completion in output.outputs]
        scheduler.check_integrity()
    for index, ask in enumerate(batch):
        assert done[str(index)] == expected(reference, ask)
    assert scheduler.pool.num_used == 0


def test_64_requests_with_too_little_memory_finish_correctly(reference: LLM, tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), **{**settings_of(reference), "max_model_len": 160, "kv_cache_memory": 512 * 240, "block_size": 4})
    batch = [(3 + 37 * i % 60, i % 5, i % 3) for i in range(64)]
    prompts = [{"prompt_token_ids": prompt_of(length, family)} for length, family, _ in batch]
    outputs = llm.generate(prompts, [params_of(kind) for *_, kind in batch], use_tqdm=False)
    assert llm.engine.core.scheduler.stats.num_preemptions > 0
    assert sum(output.metrics.num_preemptions for output in outputs) == llm.engine.core.scheduler.stats.num_preemptions
    for output, ask in zip(outputs, batch, strict=True):
        assert [c.token_ids for c in output.outputs] == expected(reference, ask)
    assert llm.engine.core.scheduler.pool.num_used == 0


def test_a_repeated_prompt_of_a_thousand_tokens_computes_at_most_one_block_again(make_checkpoint: Any) -> None:
    llm = LLM(str(make_checkpoint("llama", max_position_embeddings=1024)), dtype="float32", kv_cache_memory=2**22)
    prompt = {"prompt_token_ids": prompt_of(1000, 1)}
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    (first,) = llm.generate(prompt, params, use_tqdm=False)
    computed = llm.engine.core.scheduler.stats.num_computed_tokens
    (second,) = llm.generate(prompt, params, use_tqdm=False)
    again = llm.engine.core.scheduler.stats.num_computed_tokens - computed
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert again - 1 <= 16  # the second output token was computed too
    assert second.num_cached_tokens == 1000 - (again - 1)


def test_two_engines_with_different_settings_live_in_one_process(tiny_llama: Path, make_checkpoint: Any) -> None:
    one = LLM(str(tiny_llama), block_size=4, **BASE)
    two = LLM(str(make_checkpoint("qwen2", seed=1)), block_size=32, **{**BASE, "dtype": "bfloat16"})
    alone = one.generate({"prompt_token_ids": prompt_of(30, 0)}, params_of(0), use_tqdm=False)[0].outputs[0].token_ids
    one.engine.add_request("a", prompt_of(30, 0), params_of(0))
    two.engine.add_request("b", prompt_of(50, 1), params_of(0))
    said: list[int] = []
    while one.engine.has_unfinished_requests or two.engine.has_unfinished_requests:
        for output in one.engine.step():
            said = output.outputs[0].token_ids
        two.engine.step()
    assert said == alone
