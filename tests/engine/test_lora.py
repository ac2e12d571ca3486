"""LoRA adapters in the engine: requests of one batch, each with another adapter or none, against PEFT over transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import greedy, write_adapter

from minfer import LLM, SamplingParams
from minfer.errors import ConfigError, ModelLoadError, RequestError
from minfer.runner.graphs import LoraGraphs

TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [[5, 9, 200, 17], list(range(40, 63)), [7], [300, 8, 7, 8, 7, 8, 7]]
ADAPTERS = ["wide", None, "few", "ranked"]


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of different ranks, scales and layers."""
    settings: dict[str, dict[str, Any]] = {
        "wide": {},
        "few": {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]},
        "ranked": {"r": 20, "lora_alpha": 10, "use_rslora": True},
    }
    folder = tmp_path_factory.mktemp("adapters")
    return {name: str(write_adapter(tiny_llama, folder / name, seed, **own)) for seed, (name, own) in enumerate(settings.items())}


@pytest.fixture(scope="module")
def answers(tiny_llama: Path, adapters: dict[str, str]) -> dict[str | None, list[list[int]]]:
    """PEFT's, by adapter, to all prompts."""
    folders = {None: None, **{name: Path(folder) for name, folder in adapters.items()}}
    found = {name: greedy(tiny_llama, folder, PROMPTS, TOKENS) for name, folder in folders.items()}
    assert len({str(own) for own in found.values()}) == 4, "adapters that change nothing prove nothing"
    return found


@pytest.fixture(scope="module")
def expected(answers: dict[str | None, list[list[int]]]) -> list[list[int]]:
    return [answers[name][index] for index, name in enumerate(ADAPTERS)]


def load(folder: Path, adapters: dict[str, str] | None, **settings: Any) -> LLM:
    options = {"dtype": "float32", "device": "cpu", "threads": 1, "max_model_len": 128, "kv_cache_memory": 2**20, **settings}
    return LLM(str(folder), lora=adapters, **options)


def run(llm: LLM, prompts: list[list[int]] = PROMPTS, params: SamplingParams = GREEDY, **options: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, **options)
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "reference"},
        {},
        {"graphs": False},
        {"max_num_batched_tokens": 7, "max_num_seqs": 4, "block_size": 4},
        {"overlap": "on"},
        {"speculative": "ngram", "ngram_min_match": 1, "adaptive_drafts": False},
        {"speculative": "skip", "skip_layers": "1", "adaptive_drafts": False},
    ],
    ids=["reference", "compiled", "eager", "chunks", "overlapped", "ngram", "skip"],
)
def test_a_mixed_batch_says_what_peft_says(
    settings: dict[str, Any], tiny_llama: Path, adapters: dict[str, str], expected: list[list[int]]
) -> None:
    llm = load(tiny_llama, adapters, **settings)
    assert run(llm, lora=ADAPTERS) == expected
    stats = llm.engine.core.scheduler.stats
    assert 0 < stats.num_adapter_tokens < stats.num_computed_tokens
    if "speculative" in settings:
        assert llm.engine.core.speculation is not None
        assert llm.engine.core.speculation.stats.num_draft_tokens > 0


def test_it_is_what_merged_weights_say(tiny_llama: Path, adapters: dict[str, str], answers: dict[str | None, list[list[int]]]) -> None:
    llm = load(tiny_llama, adapters)
    for name, folder in adapters.items():
        merged = greedy(tiny_llama, Path(folder), PROMPTS, TOKENS, merge=True)
        assert merged == answers[name]
        assert run(llm, lora=name) == merged


def test_a_draft_model_knows_no_adapters_and_changes_nothing(tiny_llama: Path, adapters: dict[str, str], expected: list[list[int]]) -> None:
    llm = load(tiny_llama, adapters, speculative="draft", draft_model=str(tiny_llama), adaptive_drafts=False, num_draft_tokens=3)
    assert run(llm, lora=ADAPTERS) == expected


def test_under_preemption(tiny_llama: Path, adapters: dict[str, str], answers: dict[str | None, list[list[int]]]) -> None:
    llm = load(tiny_llama, adapters, max_model_len=48, block_size=4, kv_cache_memory=36 * 1024)
    names = ADAPTERS * 2
    assert run(llm, PROMPTS * 2, lora=names) == [answers[name][index % 4] for index, name in enumerate(names)]
    assert llm.engine.core.scheduler.stats.num_preemptions > 0


def test_siblings_share_their_prompt_and_its_adapter(
    tiny_llama: Path, adapters: dict[str, str], answers: dict[str | None, list[list[int]]]
) -> None:
    llm = load(tiny_llama, adapters)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, n=3)
    assert run(llm, [PROMPTS[1]], params, lora="wide") == [answers["wide"][1]] * 3
    assert llm.engine.core.scheduler.stats.num_forked_tokens > 0


def test_cached_prefixes_are_an_adapters_own(
    tiny_llama: Path, adapters: dict[str, str], answers: dict[str | None, list[list[int]]]
) -> None:
    llm = load(tiny_llama, adapters, block_size=4)
    for name, cached in (("wide", 0), (None, 0), ("ranked", 0), ("wide", 20), (None, 20)):
        (output,) = llm.generate({"prompt_token_ids": PROMPTS[1]}, GREEDY, use_tqdm=False, lora=name)
        assert output.num_cached_tokens == cached
        assert output.outputs[0].token_ids == answers[name][1]


def test_over_a_quantised_model(tiny_llama: Path, adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's weights are rounded as the engine's are; the adapter stays in float32 on top."""
    from transformers import AutoModelForCausalLM

    from minfer.loader.quantize_on_load import RECIPES
    from minfer.quant.algorithms import round_to_nearest

    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "cache"))
    llm = load(tiny_llama, adapters, quant="int8", activations="none")
    assert any(product.startswith("linear[int8") for product in llm.engine.core.loaded.ops.chosen), "nothing was quantised"
    rounded: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name.endswith("_proj.weight"):
                scheme = RECIPES["int8"].scheme(name, parameter.shape[1])
                parameter.copy_(round_to_nearest(parameter, scheme, search=False).dequantize())
    rounded.save_pretrained(tmp_path / "rounded")
    assert run(llm, lora="wide") == greedy(tmp_path / "rounded", Path(adapters["wide"]), PROMPTS, TOKENS)


def test_an_embedding_is_the_adapted_models(tiny_llama: Path, adapters: dict[str, str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llm = load(tiny_llama, adapters)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    got = llm.embed(prompts, use_tqdm=False, lora=["wide", None, "wide", "few"])
    for index, name in ((0, "wide"), (1, None), (3, "few")):
        oracle: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        oracle = oracle if name is None else PeftModel.from_pretrained(oracle, adapters[name])
        with torch.no_grad():
            states = oracle(input_ids=torch.tensor([PROMPTS[index]]), output_hidden_states=True).hidden_states[-1]
        vector = torch.nn.functional.normalize(states[0, -1].double(), dim=0)
        torch.testing.assert_close(torch.tensor(got[index].embedding, dtype=torch.float64), vector, rtol=1e-4, atol=1e-5)


def test_who_asks_for_no_adapter_gets_the_models_own_bits_from_its_own_recording(tiny_llama: Path, adapters: dict[str, str]) -> None:
    llm, plain = load(tiny_llama, adapters), load(tiny_llama, None)
    graph = llm.engine.core.runner.graph
    assert isinstance(graph, LoraGraphs)
    assert not isinstance(plain.engine.core.runner.graph, LoraGraphs)
    calls = [g.num_calls for g in (graph.plain, graph.adapted, plain.engine.core.runner.graph)]  # type: ignore[union-attr, attr-defined]
    assert calls[0] == calls[2]
    assert calls[1] == calls[0] + 2 * 4 * 2, "two ops for each of four products of two layers"
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    scores = [[c.logprobs for c in each.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs] for each in (llm, plain)]
    assert scores[0] == scores[1]


def test_unknown_names_are_refused_before_anything_runs(tiny_llama: Path, adapters: dict[str, str]) -> None:
    llm = load(tiny_llama, adapters)
    with pytest.raises(RequestError, match="no LoRA adapter 'other'; known: wide, few, ranked") as refusal:
        run(llm, lora=["wide", "other", None, None])
    assert refusal.value.param == "lora"
    assert not llm.engine.has_unfinished_requests
    with pytest.raises(RequestError, match="lora holds 1 entries for 4 prompts"):
        run(llm, lora=["wide"])
    with pytest.raises(RequestError, match="none was loaded"):
        run(load(tiny_llama, None), lora="wide")


def test_an_adapter_that_is_no_good_ends_the_loading(tiny_llama: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load(tiny_llama, {**adapters, "gone": str(tmp_path / "gone")})
    for bad in ({"a": ""}, {1: "b"}, ["a=b"], {"": "b"}):
        with pytest.raises(ConfigError, match="lora must map names of adapters"):
            load(tiny_llama, bad)  # type: ignore[arg-type]
