"""What the sampler takes from the batch, where it draws behind every token of a step, are the positions of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_overlap import params, run
from speculative.test_speculation import BASE, PARAMS
from speculative.test_tree import check_trees

from minfer.config import EngineConfig
from minfer.engine.simulated import simulated_engine
from minfer.kernels.simulated import find_gpu
from minfer.sampling import Drawn, Sampler, SamplingRow
from minfer.sampling_params import SamplingParams


class Watch:
    """Every call of a sampler: whether it was given positions. They are compared as they are when the call is made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.given = self.found = 0  # calls with positions, and without
        self.several = self.branched = 0  # with positions: several rows of a request, several for the same place
        self.seeds: set[int] = set()
        draw = Sampler.draw

        def watched(sampler: Sampler, logits: torch.Tensor, rows: Sequence[SamplingRow], positions: torch.Tensor | None = None) -> Drawn:
            if rows:
                self.see(rows, positions)
            return draw(sampler, logits, rows, positions)

        patch.setattr(Sampler, "draw", watched)

    def see(self, rows: Sequence[SamplingRow], positions: torch.Tensor | None) -> None:
        own, seeds = [row.position for row in rows], [row.seed for row in rows]
        self.given += positions is not None
        self.found += positions is None
        self.seeds |= {*seeds}
        if positions is not None:
            self.several += len({*seeds}) < len(rows)
            self.branched += len({*zip(seeds, own, strict=True)}) < len(rows)
            assert positions.dtype == torch.int32
            assert [newest + 1 for newest in positions.tolist()] == own


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("blocks", [40, 400], ids=["preempting", "roomy"])
def test_of_requests_of_all_kinds(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, overlap: str, blocks: int) -> None:
    """Prompts in chunks beside running requests, siblings with seeds of their own, steps under way."""
    watch = Watch(monkeypatch)
    options: dict[str, Any] = {"block_size": 4, "kv_cache_memory": 512 * 4 * blocks, "max_num_batched_tokens": 24, "max_num_seqs": 20}
    run(tiny_llama, params(), overlap=overlap, **options)
    assert watch.given > 0 < watch.found
    assert len(watch.seeds) == 3, "those of n=3"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_of_drafts_that_branch(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, backend: str) -> None:
    watch = Watch(monkeypatch)
    check_trees(tiny_llama, {**BASE, "max_num_seqs": 4, "backend": backend, "block_size": 4}, backend, PARAMS[1])
    assert watch.branched > 0, "drafts for the same place"


@pytest.mark.parametrize("drafts", [0, 3])
def test_of_steps_with_rows_of_padding(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    """Three requests in the graph of four, laid out as on a GPU."""
    watch = Watch(monkeypatch)
    drafting = {"speculative": "ngram", "ngram_min_match": 1, "num_draft_tokens": drafts, "adaptive_drafts": False} if drafts else {}
    config = EngineConfig(model="smollm2-135m", max_num_seqs=4, max_model_len=256, **drafting)  # type: ignore[arg-type]
    engine, _ = simulated_engine(config, find_gpu("h200"), "bf16")
    for n in range(3):
        engine.add_request(str(n), {"prompt_token_ids": [5] * (9 + n)}, SamplingParams(seed=n, max_tokens=12, ignore_eos=True))
    while engine.has_unfinished_requests:
        engine.step()
    assert watch.given > 3
    assert (watch.several > 0) == (drafts > 0)
