"""The offline API: inputs, outputs, refusals, failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minfer import LLM, SamplingParams
from minfer.errors import CapacityError, ConfigError, EngineDeadError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), dtype="float32", max_model_len=128, kv_cache_memory=2**21)


def test_strings_ids_and_dictionaries_mean_the_same(llm: LLM) -> None:
    text = "The quick brown fox"
    ids = llm.get_tokenizer().encode(text)
    outputs = llm.generate([text, {"prompt": text}, {"prompt_token_ids": ids}], GREEDY, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == [ids] * 3
    assert [o.prompt for o in outputs] == [text, text, None]
    assert len({o.outputs[0].text for o in outputs}) == 1
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0].text == outputs[0].outputs[0].text


def test_an_output_tells_everything(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate("A table names them", params, use_tqdm=False)
    (completion,) = output.outputs
    assert output.finished
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 5
    assert completion.logprobs is not None
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(position) == 3
        assert position[token].rank == 1
        assert position[token].logprob == max(p.logprob for p in position.values())
    total = sum(position[token].logprob for token, position in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    metrics = output.metrics
    assert metrics.num_output_tokens == 5
    assert metrics.queue_s is not None
    assert metrics.time_to_first_token_s is not None
    assert metrics.time_per_output_token_s is not None
    assert 0 <= metrics.queue_s <= metrics.time_to_first_token_s


def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(tiny_llama: Path, llm: LLM) -> None:
    chunked = LLM(str(tiny_llama), dtype="float32", max_model_len=128, kv_cache_memory=2**21, max_num_batched_tokens=7, max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = {"prompt_token_ids": [(i * i) % 500 + 3 for i in range(40)]}
    values = []
    for engine in (llm, llm, chunked):
        (output,) = engine.generate(prompt, params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        values.append([next(iter(p.values())).logprob for p in output.prompt_logprobs if p is not None])
    assert len(values[0]) == 39
    assert values[1] == values[0]
    assert values[2] == pytest.approx(values[0], abs=1e-5)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (whole,) = llm.generate("Paged caches keep", params, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    (output,) = llm.generate(
        "Paged caches keep", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=[stop]), use_tqdm=False
    )
    completion = output.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) < 40


def test_a_stop_token_ends_the_request_and_is_not_part_of_the_text(llm: LLM) -> None:
    (whole,) = llm.generate("blocks", GREEDY, use_tqdm=False)
    token = whole.outputs[0].token_ids[3]
    first = whole.outputs[0].token_ids.index(token)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[token])
    (output,) = llm.generate("blocks", params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == whole.outputs[0].token_ids[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids[:-1])


def test_min_tokens_holds_off_stop_tokens_and_stop_strings(llm: LLM) -> None:
    (whole,) = llm.generate("blocks", GREEDY, use_tqdm=False)
    token = whole.outputs[0].token_ids[0]
    params = SamplingParams(temperature=0, max_tokens=8, min_tokens=6, ignore_eos=True, stop_token_ids=[token], stop=["e", "a", " "])
    (output,) = llm.generate("blocks", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) >= 6


def test_max_tokens_is_bounded_by_the_context(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5] * 120}
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=500, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].finish_reason == "length"


def test_unseeded_requests_differ_and_a_seed_repeats(llm: LLM) -> None:
    free = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True, n=4)
    (output,) = llm.generate("x", free, use_tqdm=False)
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    seeded = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True, seed=11)
    runs = [llm.generate(["x", "other"][: 1 + i], seeded, use_tqdm=False)[0].outputs[0].token_ids for i in range(2)]
    assert runs[0] == runs[1]


def test_chat_goes_through_the_template(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)
    ids = llm.get_tokenizer().encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert output.prompt_token_ids == ids
    two = llm.chat([[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Ho"}]], GREEDY, use_tqdm=False)
    assert two[0].outputs[0].text == output.outputs[0].text


BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "empty text": ("", {}),
    "no ids": ({"prompt_token_ids": []}, {}),
    "id out of range": ({"prompt_token_ids": [1, 512]}, {}),
    "negative id": ({"prompt_token_ids": [-1]}, {}),
    "id that is no number": ({"prompt_token_ids": ["a"]}, {}),
    "unknown key": ({"prompt": "a", "image": "b"}, {}),
    "both": ({"prompt": "a", "prompt_token_ids": [1]}, {}),
    "too long": ({"prompt_token_ids": [5] * 128}, {}),
    "not a prompt": (3.5, {}),
    "logit bias outside the vocabulary": ("a", {"logit_bias": {512: 1.0}}),
    "stop id outside the vocabulary": ("a", {"stop_token_ids": [512]}),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_before_anything_runs(case: str, llm: LLM) -> None:
    prompt, params = BAD_REQUESTS[case]
    steps = llm.engine.core.times.steps
    with pytest.raises(RequestError) as refusal:
        llm.generate(["good", prompt], SamplingParams(max_tokens=4, **params), use_tqdm=False)
    assert len(str(refusal.value)) > 20
    assert llm.engine.core.times.steps == steps
    assert not llm.engine.has_unfinished_requests
    assert not llm.engine.core.scheduler.has_requests


def test_too_long_a_prompt_says_both_numbers(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"maximum context length is 128 tokens.*130 tokens") as refusal:
        llm.generate({"prompt_token_ids": [5] * 130}, GREEDY, use_tqdm=False)
    assert refusal.value.code == "context_length_exceeded"


def test_one_parameter_set_for_each_prompt(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY], use_tqdm=False)


def test_a_failing_step_fails_every_request_loudly_and_leaks_nothing(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), dtype="float32", max_model_len=128, kv_cache_memory=2**21, graphs=False)
    forward, calls = llm.engine.core.runner.model.forward_states, 0

    def fail_at_fifth(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("out of luck")
        return forward(*args)

    llm.engine.core.runner.model.forward_states = fail_at_fifth  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError, match="RuntimeError: out of luck"):
        llm.generate(["a", "b", "c"], SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.core.scheduler.pool.num_used == 0
    with pytest.raises(EngineDeadError):
        llm.generate("d", GREEDY, use_tqdm=False)


def test_logits_that_are_no_numbers_end_that_request_only(tiny_llama: Path) -> None:
    """A NaN in one row must not become a token, nor touch the row beside it."""
    llm = LLM(str(tiny_llama), dtype="float32", max_model_len=128, kv_cache_memory=2**21)
    healthy = llm.generate("good", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    compute = llm.engine.core.runner.logits

    def poison_second(hidden: Any) -> Any:
        logits = compute(hidden)
        if len(logits) == 2:
            logits[1] = float("nan")
        return logits

    llm.engine.core.runner.logits = poison_second  # type: ignore[method-assign]
    good, bad = llm.generate(["good", "bad"], GREEDY, use_tqdm=False)
    assert good.outputs[0].token_ids == healthy
    assert bad.outputs[0].finish_reason == "error"
    assert llm.engine.core.scheduler.pool.num_used == 0


def test_ctrl_c_leaves_nothing_behind(llm: LLM) -> None:
    step, calls = llm.engine.step, 0

    def interrupted() -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return step()

    llm.engine.step = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    finally:
        llm.engine.step = step  # type: ignore[method-assign]
    assert llm.engine.core.scheduler.pool.num_used == 0
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].finished


def test_too_little_memory_is_refused_with_the_length_that_fits(tiny_llama: Path) -> None:
    with pytest.raises(CapacityError, match="--max-model-len 96 or less"):
        LLM(str(tiny_llama), dtype="float32", max_model_len=512, kv_cache_memory=512 * 100)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 10**6},
        {"nonsense": 1},
        {"dtype": "int3"},
        {"block_size": 12},
        {"max_num_seqs": 0},
        {"max_num_seqs": 100, "max_num_batched_tokens": 50},
        {"backend": "nonsense"},
        {"policy": "random"},
        {"memory_utilization": 1.5},
        {"kv_cache_memory": 2**60},
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(options)).split("_")[0]):
        LLM(str(tiny_llama), **options)
