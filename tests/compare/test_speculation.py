"""compare.speculation: drafts as right as they were told to be, and a page from stored figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compare import speculation, speculation_batches, speculation_forced
from compare.speculation_forced import Forced
from minfer import LLM, SamplingParams


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_forced_drafts_are_right_as_often_as_wanted_and_change_nothing(tiny_llama: Path, rate: float) -> None:
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_memory": 2**22}
    drafting = {"speculative": "draft", "draft_model": str(tiny_llama), "adaptive_drafts": False, "num_draft_tokens": 4}
    llm = LLM(str(tiny_llama), **options, **drafting)
    core = llm.engine.core.speculation
    assert core is not None
    core.sources[0].proposer = forced = Forced(core.sources[0].proposer, 512)
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    plain, with_drafts = [], []
    plain += llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)[0].outputs[0].token_ids
    assert core.stats.num_drafts == 0
    forced.truth, forced.rate = plain, rate
    with_drafts += llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)[0].outputs[0].token_ids
    assert with_drafts == plain
    first = core.stats.accepted_at[0] / core.stats.num_drafts
    assert abs(first - rate) <= (0 if rate in (0.0, 1.0) else 0.2)


def test_the_page_is_made_of_stored_figures() -> None:
    machine = {"cpu": "a CPU", "cores": 2}
    drafts = {"drafts": 50, "draft_tokens": 150, "accepted_tokens": 60}
    runs: list[dict[str, Any]] = [
        {"text": kind, "batch": batch, "variant": name, "decode_tokens_per_s": n * speed, "output_tokens": 160, **more}
        for kind in speculation.TEXTS
        for batch in speculation.BATCHES
        for n in (1, 2, 3)
        for name, speed, more in (
            ("plain", 100.0, {}),
            ("ngram", 150.0, {"drafts": drafts, "accepted_at": [40, 20, 0], "plain_tokens_per_s": n * 100.0}),
        )
    ]
    results = {"machine": machine, "model": "m", "command": "c", "runs": runs}
    assert "| quoting | ngram | 300 | 1.50x (1.50 to 1.50) | 1.6 | 80%, 40%, 0% |" in speculation.texts_table(results)
    results["runs"] = runs[1:]
    assert "medians of 2 to 3 interleaved answers" in speculation.texts_table(results)
    pairs = [{"seconds": 1.0, "tokens": 110 * n, "plain_seconds": 2.0, "plain_tokens": 200 * n} for n in (1, 2)]
    results["runs"] = [{"batch": batch, "variant": "ngram", "pairs": pairs} for batch in (32, 1)]
    assert "| 32 | 150 | 165 | 1.100x (1.100 to 1.100, 2 pairs) |" in speculation.batches_table(results)
    heads = {"model": "m", "runs": [{"command": "train", "held_out_acceptance": [0.663, 0.42]}]}
    assert "| `train` | 66%, 42% |" in speculation.heads_table(heads)
    rates = [
        {"rate": rate, "tokens_per_s": n * 7.0, "tokens_a_step": 1.0 if rate is None else 1.9} for n in (1, 3, 2) for rate in (None, 0.5)
    ]
    forced = {"target": "big", "drafter": "small", "quant": "int4", "drafts": 4, "command": "c", "runs": rates}
    assert "| 50% | 14.00 | 1.9 | 1.00x |" in speculation_forced.table(forced)


def test_a_part_is_measured_in_pieces(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second piece adds to the file of the first, and each ends when its time is over."""
    (tmp_path / "results").mkdir()
    page = tmp_path / "page.md"
    page.write_text("<!-- generated:begin -->\n<!-- generated:end -->\n")
    monkeypatch.setattr(speculation, "ROOT", tmp_path)
    monkeypatch.setattr(speculation, "PAGE", page)
    counts = []
    for pieces in ([], ["--append"], []):
        arguments = ["forced", "--target", str(tiny_llama), "--drafter", str(tiny_llama), "--rounds", "3", "--seconds", "0", *pieces]
        monkeypatch.setattr("sys.argv", ["compare.speculation", *arguments])
        speculation.main()
        (file,) = (tmp_path / "results").glob("*.json")
        counts.append(len(json.loads(file.read_text())["runs"]))
    assert counts == [1, 2, 1]
    assert "random weights" in page.read_text()


def test_drafts_are_switched_off_and_on_within_an_answer(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block has its steps, only blocks with drafts may say more than a token a step, and what is said stays what it is."""
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_memory": 2**24, "max_num_seqs": 4}
    llm = LLM(str(tiny_llama), **options, speculative="draft", draft_model=str(tiny_llama), num_draft_tokens=2, adaptive_drafts=False)
    prompts = [{"prompt_token_ids": [5, 6, n]} for n in (7, 8)]
    monkeypatch.setattr(speculation_batches, "PARAMS", SamplingParams(temperature=0, max_tokens=160, ignore_eos=True))
    llm.chat = lambda chats, params, use_tqdm: llm.generate(chats, params, use_tqdm=use_tqdm)  # type: ignore[method-assign, assignment, misc]
    plain = LLM(str(tiny_llama), **options).generate(prompts, speculation_batches.PARAMS, use_tqdm=False)
    for first in (True, False):
        tokens, pairs = speculation_batches.answer(llm, prompts, drafts_first=first)
        assert tokens == [list(output.outputs[0].token_ids) for output in plain]
        assert len(pairs) >= 4
        for pair in pairs:
            assert pair["plain_tokens"] == 2 * speculation_batches.BLOCK
            assert pair["tokens"] > 1.5 * pair["plain_tokens"]
    assert llm.engine.core.speculation is not None
