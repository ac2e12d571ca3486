"""Embeddings against transformers' last hidden states; however the prompts are batched, chunked, cached or put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from minfer import LLM, SamplingParams
from minfer.errors import RequestError

PROMPTS = [[5, 9, 300, 17], [7], list(range(3, 200)), [100, 101] * 40]
BASE: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 256, "kv_cache_memory": 2**22}


@pytest.fixture(scope="module")
def hidden(tiny_llama: Path) -> list[torch.Tensor]:
    """The last hidden states of each prompt, [T, H], after the final norm."""
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0] for ids in PROMPTS]


def expected(states: torch.Tensor, pooling: str) -> torch.Tensor:
    pooled = states[-1] if pooling == "last" else states.mean(0)
    return pooled / pooled.norm()


def embeddings(llm: LLM, pooling: Any, prompts: list[list[int]] = PROMPTS) -> torch.Tensor:
    outputs = llm.embed(prompts, pooling=pooling, use_tqdm=False)
    assert all(output.finished and output.outputs[0].token_ids == [] for output in outputs)
    return torch.tensor([output.embedding for output in outputs])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "reference"},
        {"backend": "cpu"},
        {"backend": "reference", "max_num_batched_tokens": 24, "max_num_seqs": 4, "max_prefill_chunk": 7},
        {"backend": "reference", "speculative": "ngram", "ngram_min_match": 1, "max_prefill_chunk": 3},
    ],
    ids=["reference", "cpu", "chunks", "speculative"],
)
def test_as_transformers(tiny_llama: Path, hidden: list[torch.Tensor], pooling: str, options: dict[str, Any]) -> None:
    llm = LLM(str(tiny_llama), **BASE, **options)
    vectors = embeddings(llm, pooling)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(PROMPTS)), atol=1e-6)
    for vector, states in zip(vectors, hidden, strict=True):
        assert torch.allclose(vector, expected(states, pooling), atol=2e-5)
    assert llm.engine.core.scheduler.pool.num_used == 0
    cached = embeddings(llm, pooling)  # now from the prefix cache, as far as that is allowed
    assert torch.allclose(cached, vectors, atol=1e-6)
    hits = llm.engine.core.scheduler.stats.num_prefix_hits
    assert hits == 0 if pooling == "mean" else hits > 0


def test_beside_generation_and_with_too_little_memory(tiny_llama: Path, hidden: list[torch.Tensor]) -> None:
    """Embeddings wait, are preempted and share steps with requests that generate, and nobody's result changes."""
    llm = LLM(str(tiny_llama), **{**BASE, "kv_cache_memory": 20 * 16 * 512, "backend": "reference", "max_num_batched_tokens": 64})
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (alone,) = llm.generate([[5, 6, 7, 8]], params, use_tqdm=False)
    engine.add_request("talk", [5, 6, 7, 8], params, kind="final")
    for n in range(12):
        engine.add_embedding(f"e{n}", PROMPTS[n % 4], "mean" if n % 2 else "last")
    finished = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            finished[output.request_id] = output
        engine.core.scheduler.check_integrity()
    assert finished["talk"].outputs[0].token_ids == alone.outputs[0].token_ids
    for n in range(12):
        vector = torch.tensor(finished[f"e{n}"].embedding)
        assert torch.allclose(vector, expected(hidden[n % 4], "mean" if n % 2 else "last"), atol=2e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_one_that_is_displaced_half_way_begins_again(tiny_llama: Path, hidden: list[torch.Tensor], pooling: Any) -> None:
    options = {**BASE, "kv_cache_memory": 20 * 16 * 512, "backend": "reference", "policy": "priority", "max_prefill_chunk": 20}
    engine = LLM(str(tiny_llama), **options).engine
    engine.add_embedding("long", PROMPTS[2], pooling, priority=1)
    for _ in range(4):
        engine.step()
    engine.add_request("urgent", [9] * 150, SamplingParams(max_tokens=3, ignore_eos=True), priority=-1, kind="final")
    finished = {}
    while engine.has_unfinished_requests:
        finished.update({output.request_id: output for output in engine.step()})
        engine.core.scheduler.check_integrity()
    assert list(finished) == ["urgent", "long"]
    assert finished["long"].metrics.num_preemptions == 1
    assert torch.allclose(torch.tensor(finished["long"].embedding), expected(hidden[2], pooling), atol=2e-5)


def test_a_prompt_may_fill_the_context(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), **BASE, backend="reference")
    assert len(llm.embed([[5] * 256], use_tqdm=False)[0].embedding or ()) == 64
    with pytest.raises(RequestError, match="maximum context length is 256 tokens"):
        llm.embed([[5] * 257], use_tqdm=False)
    with pytest.raises(RequestError, match="pooling must be one of last, mean"):
        llm.embed([[5]], pooling="max", use_tqdm=False)  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished_requests
