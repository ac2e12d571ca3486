"""Mixtures of experts against transformers: float32, tiny random models of each family, through the model and through the engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_llama import PROMPT, load, logits_of, transformers_logits
from safetensors.torch import save_file

from minfer import LLM, SamplingParams
from minfer.errors import ModelLoadError
from minfer.loader import open_checkpoint
from minfer.loader.names import KNOWN
from minfer.model_config import ModelConfig

SMALL = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, top 1 of 3": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "mixtral, every expert": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "mixtral, sliding window": ("mixtral", {"sliding_window": 7}),
    "qwen2-moe": ("qwen2_moe", {**SMALL, "shared_expert_intermediate_size": 48}),
    "qwen2-moe, renormalised": ("qwen2_moe", {**SMALL, "shared_expert_intermediate_size": 32, "norm_topk_prob": True}),
    "qwen2-moe, a dense layer": ("qwen2_moe", {**SMALL, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2}),
    "qwen3-moe": ("qwen3_moe", {**SMALL, "norm_topk_prob": True, "head_dim": 32}),
    "qwen3-moe, not renormalised": ("qwen3_moe", {**SMALL, "norm_topk_prob": False}),
    "qwen3-moe, a dense layer": ("qwen3_moe", {**SMALL, "mlp_only_layers": [0]}),
    "qwen3-moe, sliding window": ("qwen3_moe", {**SMALL, "use_sliding_window": True, "sliding_window": 5}),
    "qwen3, no experts": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, backend: str, make_checkpoint: Callable[..., Path]) -> None:
    family, settings = CASES[case]
    folder = make_checkpoint(family, **settings)
    expected = transformers_logits(folder, PROMPT)
    assert expected.std() > 0.5, "flat logits would hide a difference"
    loaded = load(folder, backend=backend)
    for chunks in ([45], [1] * 45, [16, 1, 15, 13]):
        assert (logits_of(loaded, PROMPT, chunks) - expected).abs().max() <= 1e-4


FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {**SMALL, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**SMALL, "norm_topk_prob": True, "head_dim": 32},
}
PROMPTS = [[5, 9, 200, 17], list(range(40, 75)), [7], [*range(40, 72), 11, 12]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(request.param, **FAMILIES[request.param])


def generated(folder: Path, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "kv_cache_memory": 2**20, **settings}
    llm = LLM(str(folder), **options)
    return [out.outputs[0].token_ids for out in llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)]


def test_an_engine_says_what_transformers_says(folder: Path) -> None:
    """Four requests at once, two of which share a prefix, prompts in chunks, the step recorded once and replayed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(p) :].tolist() for p in PROMPTS
    ]
    options = {"backend": "cpu", "max_prefill_chunk": 9, "block_size": 16, "max_num_batched_tokens": 40, "max_num_seqs": 4}
    llm = LLM(str(folder), dtype="float32", device="cpu", max_model_len=128, kv_cache_memory=2**20, **options)
    assert llm.engine.core.runner.graph is not None, "a step with experts is recorded like any other"
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    assert generated(folder, backend="reference") == expected


def test_batches_and_replay_change_no_bit(folder: Path) -> None:
    alone = [generated(folder, [prompt], dtype="bfloat16", graphs=False)[0] for prompt in PROMPTS]
    assert generated(folder, dtype="bfloat16", max_prefill_chunk=7) == alone


def test_speculation_changes_no_token(folder: Path) -> None:
    plain = generated(folder)
    assert generated(folder, speculative="ngram", ngram_min_match=1, adaptive_drafts=False) == plain
    assert generated(folder, speculative="skip", skip_layers="1", num_draft_tokens=3, adaptive_drafts=False) == plain


@pytest.mark.parametrize("quant", ["int8", "fp8", "int4"])
def test_quantised_while_loading(folder: Path, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert's matrices and not the routers, and then the logits of transformers with the rounded weights."""
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "cache"))
    loaded = load(folder, backend="cpu", quant=quant, activations="none")
    infos = loaded.checkpoint.tensor_infos
    experts = [name for name in infos if ".experts." in name]
    assert experts and all(infos[name].dtype == quant for name in experts)
    assert all(infos[name].dtype != quant for name in infos if name.endswith(("gate.weight", "norm.weight")))
    rounded = {name: loaded.checkpoint.read(name).contiguous() for name in infos}
    assert not torch.equal(rounded[experts[0]], open_checkpoint(loaded.checkpoint.source).read(experts[0]))
    (tmp_path / "model").mkdir()
    save_file(rounded, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path / "model")
    expected = transformers_logits(tmp_path / "model", PROMPT)
    for own in (loaded, load(folder, backend="reference", quant=quant)):
        assert (logits_of(own, PROMPT, [30, 15]) - expected).abs().max() <= 1e-3


def test_a_config_that_cant_be() -> None:
    base = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for changed, reason in (
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts there are"),
        ({"num_local_experts": 0}, "num_experts of the model's mixture of experts must be a positive whole number, not 0"),
        ({"num_local_experts": 10**6}, "a mixture of 1000000 experts is beyond any model"),
    ):
        with pytest.raises(ModelLoadError, match=reason):
            ModelConfig.from_hf({"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 1, **base, **changed})


def test_parameters_that_a_token_meets() -> None:
    """The figures that the models' makers give: 46.7 and 12.9, 14.3 and 2.7, 30.5 and 3.3 thousand millions."""
    for name, total, active in (("mixtral-8x7b", 46.7, 12.9), ("qwen1.5-moe-a2.7b", 14.3, 2.7), ("qwen3-30b-a3b", 30.5, 3.3)):
        config = ModelConfig.from_hf(KNOWN[name].config)
        assert config.num_parameters / 1e9 == pytest.approx(total, abs=0.06)
        assert config.num_active_parameters / 1e9 == pytest.approx(active, abs=0.06)
