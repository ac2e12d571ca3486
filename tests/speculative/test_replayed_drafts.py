"""Engines whose steps are replayed from CUDA graphs say what eager ones say, whoever drafts, and replay every step that a graph serves.

The device is the CPU: a capture keeps the function and the memory of its results. Attention, which alone looks beyond its row, reads
nothing of a batch but what is on the device (`kernels/cpu/attention.cpp`), so a step over wrong padding would show. What a replay returned
is NaN from the next one on, as on a GPU it would be somebody else's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import write_adapter
from speculative.conftest import IDS

from minfer import LLM, SamplingParams
from minfer.batch import Batch
from minfer.kernels.cpu import CpuBackend
from minfer.kvcache import LayerCache
from minfer.runner import BatchBuilder
from minfer.runner.decode_graphs import DecodeGraphs, Run
from minfer.runner.upload import copy_later

BASE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "backend": "cpu", "threads": 1, "max_model_len": 160, "block_size": 4}
DRAFTING: dict[str, Any] = {"num_draft_tokens": 3, "ngram_min_match": 1, "adaptive_drafts": False}
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
PROMPTS = [[3 + (n * n + 5 * (at % (3 + n))) % 400 for at in range(length)] for n, length in enumerate((50, 9, 33, 70, 21, 14))]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.3, seed=7, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=22, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.5, seed=5, n=2, max_tokens=10, ignore_eos=True, prompt_logprobs=1),
    # Few ids, so that a head without any training is right now and then.
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logit_bias=dict.fromkeys(IDS[10:13].tolist(), 90.0)),
]


class StandIn:
    """A capture on a device that has none."""

    def __init__(self) -> None:
        self._results: list[Sequence[torch.Tensor]] = []

    def __call__(self, run: Run) -> Run:
        run()
        results = run()
        self._results.append(results)

        def replay() -> Sequence[torch.Tensor]:
            for result in (one for every in self._results for one in every):
                result.fill_(torch.nan)
            for result, computed in zip(results, run(), strict=True):
                result.copy_(computed)
            return results

        return replay


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    write_kv = CpuBackend.write_kv

    def write_real_rows(self: CpuBackend, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        real = slots >= 0
        write_kv(self, k[real], v[real], cache, slots[real])

    monkeypatch.setattr(CpuBackend, "write_kv", write_real_rows)
    monkeypatch.setattr("minfer.engine.core._on_gpu", lambda loaded: loaded.config.graphs)
    monkeypatch.setattr("minfer.engine.core.BatchBuilder", functools.partial(BatchBuilder, copy=copy_later))
    monkeypatch.setattr("minfer.runner.decode_graphs.cuda_recorder", StandIn)


def watch(graph: Any) -> list[Batch]:
    """The steps that it is given, from now on."""
    assert isinstance(graph, DecodeGraphs)
    replay, seen = graph.replay, []

    def watched(batch: Batch) -> list[torch.Tensor]:
        seen.append(batch)
        return replay(batch)

    graph.replay = watched  # type: ignore[method-assign]
    return seen


def replayed_with_drafts(batches: Sequence[Batch]) -> int:
    """How many were replayed and had several tokens of a request. Not replayed are prompts only."""
    for batch in batches:
        assert (batch.padded is None) == (max(batch.query_lens_host) > 4)
    return sum(batch.padded is not None and batch.num_tokens > batch.num_requests for batch in batches)


def said(llm: LLM, **options: Any) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS, use_tqdm=False, **options)
    assert llm.engine.core.scheduler.pool.num_used == 0
    return [(one.token_ids, one.logprobs) for output in outputs for one in output.outputs] + [output.prompt_logprobs for output in outputs]


def counted(llm: LLM) -> tuple[int, int, list[int]]:
    assert llm.engine.core.speculation is not None
    stats = llm.engine.core.speculation.stats
    return stats.num_drafts, stats.num_draft_tokens, stats.accepted_at


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> list[Any]:
    return said(LLM(str(tiny_llama), **BASE, kv_cache_memory=2**22, graphs=False, prefix_caching=False))


@pytest.fixture(scope="module")
def drafters(tiny_llama: Path, make_checkpoint: Any, head_folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Settings by name. A stranger is mostly wrong, a twin always right."""
    models = {"stranger": make_checkpoint("llama", seed=5), "twin": tiny_llama, **head_folders}
    named = {name: {"speculative": "draft", "draft_model": str(folder)} for name, folder in models.items()}
    branching = {f"{name}, branching": {**named[name], "draft_top_k": 3} for name in ("eagle", "eagle3", "medusa")}
    return {"ngram": {"speculative": "ngram"}, "skip": {"speculative": "skip", "skip_layers": "1"}, **named, **branching}


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "preempting"])
@pytest.mark.parametrize(
    "name",
    ["ngram", "stranger", "twin", "skip", "eagle", "eagle3", "redrafter", "eagle, branching", "eagle3, branching", "medusa, branching"],
)
def test_steps_with_drafts_are_replayed_and_change_nothing(
    tiny_llama: Path, drafters: dict[str, dict[str, Any]], plain: list[Any], as_on_a_gpu: None, name: str, tight: bool
) -> None:
    """In a small pool with a small budget, prompts come in chunks beside the others' drafts, and requests are preempted."""
    settings = {**BASE, **DRAFTING, **drafters[name], "kv_cache_memory": 2**22}
    if tight:
        share = 2 if name in ("stranger", "twin") else 1.5 if "eagle" in name else 1  # what a block takes with the drafter's layers
        memory = int(TOKEN_BYTES * 120 * share)
        settings |= {"max_model_len": 112, "max_num_batched_tokens": 24, "max_num_seqs": 4, "kv_cache_memory": memory}
    eager, replayed = (LLM(str(tiny_llama), **settings, graphs=graphs) for graphs in (False, True))
    core = replayed.engine.core
    steps = watch(core.runner.graph)
    runner = getattr(core.speculation.sources[0].proposer, "_runner", None)  # type: ignore[union-attr]
    graph = None if runner is None else runner._graph if hasattr(runner, "_graph") else runner.graph
    passes = [] if graph is None else watch(graph)
    assert said(replayed) == plain
    assert said(eager) == plain
    assert counted(replayed) == counted(eager), "drafts are made by graphs, too, and must be the same"
    assert counted(replayed)[1] > 0
    assert replayed_with_drafts(steps) > 5
    if graph is not None:
        caught_up = replayed_with_drafts(passes)  # a head with all that was drawn, a model with what it didn't draft itself
        assert caught_up > 0 or "eagle" not in name
        assert sum(batch.padded is not None for batch in passes) > 10
    if "branching" in name:
        assert any(batch.padded is not None and batch.padded.tails is not None for batch in steps)
    assert (core.scheduler.stats.num_preemptions > 0) == tight


def test_drafts_of_requests_with_adapters_are_replayed(tiny_llama: Path, as_on_a_gpu: None, tmp_path: Path) -> None:
    adapters = {name: str(write_adapter(tiny_llama, tmp_path / name, seed, r=rank)) for name, seed, rank in (("a", 0, 4), ("b", 1, 24))}
    asked = ["a", None, "b", "a", None, "b"]
    options: dict[str, Any] = {**BASE, "kv_cache_memory": 2**22, "lora": adapters}
    expected = said(LLM(str(tiny_llama), **options, graphs=False), lora=asked)
    llm = LLM(str(tiny_llama), **options, **DRAFTING, speculative="ngram")
    steps = watch(llm.engine.core.runner.graph)
    assert said(llm, lora=asked) == expected
    assert any(batch.padded is not None and batch.padded.lora is not None and max(batch.query_lens_host) > 1 for batch in steps)
    assert replayed_with_drafts(steps) > 5
