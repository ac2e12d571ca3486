"""Heads guess what the published modules would, whatever was accepted, shared, chunked or preempted before; bad ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from speculative.conftest import IDS, LAYOUTS
from speculative.published_heads import Published

from minfer import LLM, SamplingParams
from minfer.errors import ConfigError, ModelLoadError
from minfer.loader.heads import is_head, read_head
from minfer.scheduler import Request
from minfer.speculative.policy import Bar

BASE: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 256, "kv_cache_memory": 2**22, "block_size": 4}
# Few ids, so that a head without any training is right now and then, and what it does after that is seen too.
FEW = IDS[10:13].tolist()
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logit_bias=dict.fromkeys(FEW, 90.0))


def drafting(tiny_llama: Path, folder: Path, **settings: Any) -> LLM:
    options = {**BASE, "speculative": "draft", "draft_model": str(folder), "adaptive_drafts": False, "num_draft_tokens": 4, **settings}
    return LLM(str(tiny_llama), **options)


def watch(llm: LLM) -> list[tuple[list[int], int, list[int]]]:
    """From now on, every proposal: the tokens so far, how many were asked for, the drafts."""
    proposer = llm.engine.core.speculation.sources[0].proposer  # type: ignore[union-attr]
    propose, seen = proposer.propose, []

    def watched(requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        drafts = propose(requests, counts, bar)
        seen.extend((list(request.token_ids), count, said) for request, count, said in zip(requests, counts, drafts, strict=True))
        return drafts

    proposer.propose = watched  # type: ignore[method-assign]
    return seen


def prompts() -> list[dict[str, list[int]]]:
    torch.manual_seed(3)
    shared = torch.randint(3, 500, (21,)).tolist()
    return [{"prompt_token_ids": [*shared, *torch.randint(3, 500, (n,)).tolist()]} for n in (1, 9, 30)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_drafts_are_those_of_the_published_module(tiny_llama: Path, head_folders: dict[str, Path], name: str, backend: str) -> None:
    from transformers import AutoModelForCausalLM

    llm = drafting(tiny_llama, head_folders[name], backend=backend, max_num_batched_tokens=16, max_num_seqs=4, prefix_caching=False)
    seen = watch(llm)
    llm.generate(prompts(), PARAMS, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64, attn_implementation="eager")
    head = Published(head_folders[name], model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach())
    kept = llm.engine.core.speculation.stats.num_accepted_tokens  # type: ignore[union-attr]
    assert kept > 5, "nothing was accepted, so nothing after an accepted draft was seen"
    assert len(seen) > 20
    layer = model.model.layers[-1]
    for tokens, count, drafts in seen[::2]:
        raw: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda module, args, out, raw=raw: raw.append(out[0] if isinstance(out, tuple) else out))
        with torch.inference_mode():
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        hook.remove()
        streams = [*(state[0] for state in states[:-1]), raw[0].view(len(tokens) - 1, -1)]  # the last entry has the final norm in it
        assert drafts == head.draft(tokens, streams, states[-1][0], count, torch.tensor(FEW))


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
def test_pairs_that_waited_and_prefixes_from_the_cache_guess_the_same(tiny_llama: Path, head_folders: dict[str, Path], name: str) -> None:
    """What a request's own history was must not show: drafted at every step, or not for a while, or begun from cached blocks."""
    plain = drafting(tiny_llama, head_folders[name], prefix_caching=False)
    first = watch(plain)
    plain.generate(prompts(), PARAMS, use_tqdm=False)
    guesses = {tuple(tokens): drafts for tokens, _, drafts in first}
    other = drafting(tiny_llama, head_folders[name], prefix_caching=True)
    proposer = other.engine.core.speculation.sources[0].proposer  # type: ignore[union-attr]
    propose = proposer.propose
    proposer.propose = lambda requests, counts, bar: (  # type: ignore[method-assign, assignment]
        propose(requests, counts, bar) if requests and len(requests[0].output_token_ids) > 9 else [[] for _ in requests]
    )
    second = watch(other)
    for _ in range(2):
        other.generate(prompts(), PARAMS, use_tqdm=False)
    assert other.engine.core.scheduler.stats.num_prefix_hits > 0
    pairs = [(guesses[tuple(tokens)], drafts) for tokens, _, drafts in second if drafts and tuple(tokens) in guesses]
    assert len(pairs) > 10
    # A cached block's last entry may know another next token, so a few guesses may differ.
    assert sum(ours == theirs for ours, theirs in pairs) >= 0.8 * len(pairs)


@pytest.mark.parametrize("name", ["eagle", "eagle3", "speculators"])
def test_greedy_guesses_take_a_shorter_way_and_are_the_same(tiny_llama: Path, head_folders: dict[str, Path], name: str) -> None:
    """Recorded and without laying logits out over all ids, or neither; a bias that changes nothing asks for the long way."""
    params = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logit_bias=bias) for bias in ({}, {5: 0.0})]
    assert [own.plain for own in params] == [True, False]
    guesses = []
    for own, graphs in ((params[0], True), (params[0], False), (params[1], True)):
        llm = drafting(tiny_llama, head_folders[name], graphs=graphs)
        seen = watch(llm)
        llm.generate(prompts(), own, use_tqdm=False)
        guesses.append(seen)
    assert guesses[0] == guesses[1] == guesses[2]
    assert len({token for *_, drafts in guesses[0] for token in drafts}) > 3


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
def test_a_request_that_is_not_drafted_for_keeps_its_newest_pairs_only(
    tiny_llama: Path, head_folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minfer.speculative.eagle.LONGEST_WAIT", 8)
    llm = drafting(tiny_llama, head_folders[name], max_num_batched_tokens=16, max_num_seqs=4)
    core = llm.engine.core
    proposer = core.speculation.sources[0].proposer  # type: ignore[union-attr]
    propose, waited = proposer.propose, []

    def late(requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> Any:
        waited.extend((proposer._waiting[request].count, request.num_tokens) for request in requests)  # type: ignore[union-attr]
        return propose(requests, counts, bar) if len(requests[0].output_token_ids) > 20 else [[] for _ in requests]

    proposer.propose = late  # type: ignore[method-assign, assignment]
    said = llm.generate(prompts(), PARAMS, use_tqdm=False)
    plain = LLM(str(tiny_llama), **BASE).generate(prompts(), PARAMS, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in said] == [output.outputs[0].token_ids for output in plain]
    assert max(count for count, _ in waited) == 8
    assert core.speculation.stats.num_drafts > 0  # type: ignore[union-attr]


def test_the_kinds_are_told_apart(tiny_llama: Path, head_folders: dict[str, Path]) -> None:
    kinds = {name: read_head(folder).config.kind for name, folder in head_folders.items()}
    assert list(kinds.values()) == ["eagle", "eagle3", "eagle3", "medusa", "medusa", "redrafter"]
    assert all(is_head(folder) for folder in head_folders.values())
    assert not is_head(tiny_llama)


def damaged(folder: Path, tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> Path:
    copy = tmp_path / "head"
    shutil.copytree(folder, copy)
    raw = {**json.loads((copy / "config.json").read_text()), **config}
    (copy / "config.json").write_text(json.dumps(raw))
    merged = {name: t for name, t in {**load_file(copy / "model.safetensors"), **tensors}.items() if t is not None}
    save_file(merged, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize(
    ("name", "config", "tensors", "error", "message"),
    [
        ("eagle3", {"hidden_size": 32, "head_dim": 16}, {}, ConfigError, "states of 32"),
        ("eagle3", {}, {"midlayer.hidden_norm.weight": None}, ModelLoadError, "lacks the tensor 'midlayer.hidden_norm.weight'"),
        ("eagle3", {}, {"extra.weight": torch.zeros(2)}, ModelLoadError, "no place for"),
        ("eagle3", {}, {"d2t": torch.full((len(IDS),), 600)}, ModelLoadError, "map of"),
        ("eagle3", {}, {"norm.weight": torch.full((64,), torch.nan)}, ModelLoadError, "not finite"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, {}, ConfigError, r"\[1, 2, 3\]"),
        ("speculators", {"speculators_model_type": "dflash"}, {}, ModelLoadError, "dflash"),
        ("medusa", {"vocab_size": 300}, {f"{n}.2.weight": torch.zeros(300, 64) for n in range(3)}, ConfigError, "vocabulary of 300"),
        ("redrafter", {"exit_dim": "wide"}, {}, ModelLoadError, "wrong kind"),
    ],
    ids=str,
)
def test_a_head_that_does_not_fit_is_refused(
    tiny_llama: Path, head_folders: dict[str, Path], tmp_path: Path, name: str, config: Any, tensors: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        drafting(tiny_llama, damaged(head_folders[name], tmp_path, config, tensors))


def test_the_head_of_a_quantised_model_is_rounded_and_drafts_nearly_the_same(make_checkpoint: Any, head_folders: dict[str, Path]) -> None:
    target = make_checkpoint("llama", seed=3)
    options = {"speculative": "draft", "draft_model": str(head_folders["eagle3"]), "adaptive_drafts": False, "num_draft_tokens": 1}
    guesses = []
    for quant in ("int8", "none"):
        llm = LLM(str(target), **{**BASE, **options, "quant": quant})
        seen = watch(llm)
        llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        guesses.append({tuple(tokens): drafts for tokens, _, drafts in seen})
        kinds = llm.engine.core.loaded.ops.chosen
        assert any("int8" in kind for kind in kinds) == (quant == "int8")
    both = guesses[0].keys() & guesses[1].keys()
    assert len(both) >= 3
    assert sum(guesses[0][key] == guesses[1][key] for key in both) >= len(both) / 2


def test_the_layers_that_are_read_can_be_said(tiny_llama: Path, head_folders: dict[str, Path]) -> None:
    llm = drafting(tiny_llama, head_folders["eagle3"], draft_states="2,1,0")
    assert tuple(llm.engine.core.speculation.sources[0].proposer.after) == (2, 1, 0)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="for an EAGLE-3 head"):
        drafting(tiny_llama, head_folders["medusa"], draft_states="2,1,0")
    with pytest.raises(ConfigError, match="is a whole model"):
        drafting(tiny_llama, tiny_llama, draft_states="2,1,0")
    with pytest.raises(ConfigError, match="draft_states must be numbers"):
        drafting(tiny_llama, head_folders["eagle3"], draft_states="last")
