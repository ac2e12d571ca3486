"""The real model against transformers, which runs on the same weights dequantised by the gguf package."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minfer import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village at the edge of the forest,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, cols):",
    "Q: What is 17 + 25?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    '{"name": "Alice", "age": 30, "city":',
    "SELECT name, COUNT(*) FROM orders WHERE",
    "La tour Eiffel se trouve à",
    "Die Hauptstadt von Deutschland ist",
    "東京は",
    "Emoji: 🌍🌎🌏 are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Step 1: Preheat the oven to 350 degrees.\nStep 2:",
    "<h1>Welcome</h1>\n<p>",
    "Roses are red,\nViolets are blue,\n",
    "The mitochondria is the",
    "In 1969, Neil Armstrong",
    "a",
    "    \n\n\t",
    "To be, or not to be, that is the question: " * 8,
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def oracle(smollm2_hf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_hf, dtype=torch.float32)


@pytest.fixture(scope="module")
def exact_oracle(smollm2_hf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_hf, dtype=torch.float64)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(request: pytest.FixtureRequest) -> LLM:
    """Both backends on dequantised weights: the transformers oracle has no quantised activations either."""
    return LLM("smollm2-135m", dtype="float32", quant="none", backend=request.param, max_model_len=1024, kv_cache_memory=2**28)


def test_greedy_tokens_are_those_of_transformers(llm: LLM, oracle: Any) -> None:
    """64 greedy tokens of each prompt, all prompts in one batch. transformers is asked once per prompt what it would have
    said after each prefix of our answer: if it agrees everywhere, its own greedy answer is the same, by induction.
    """
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False)
    for output in outputs:
        answer = output.outputs[0].token_ids
        assert len(answer) == 64
        tokens = output.prompt_token_ids + answer
        with torch.inference_mode():
            logits = oracle(torch.tensor([tokens])).logits[0]
        said = logits[len(output.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
        assert said == answer, output.prompt


def test_prompt_logprobs_are_those_of_transformers(llm: LLM, oracle: Any) -> None:
    """Every position's log-probability within 1e-4, through the engine and in chunks."""
    ids = llm.get_tokenizer().encode(" ".join(PROMPTS))
    (output,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(ids)
    for position in range(1, len(ids)):
        entry = output.prompt_logprobs[position]
        assert entry is not None
        assert abs(entry[ids[position]].logprob - float(expected[position - 1, ids[position]])) <= 1e-4


def test_logits_are_as_near_to_the_exact_ones_as_those_of_transformers(llm: LLM, oracle: Any, exact_oracle: Any) -> None:
    """Logits of size 18 hold six digits in float32, of which 30 layers of sums in any order cost one. So two right programs
    differ by 1e-4, and neither is the truth: transformers in float64 is. The compiled backend is about as far from it as
    transformers in float32 (7e-5); products that sum in one long chain are three times as far, and fail.
    """
    from minfer.runner import RowSpan

    tokens = llm.get_tokenizer().encode(PROMPTS[20])
    row, count = SimpleNamespace(token_ids=tokens, blocks=list(range(20))), len(tokens)
    runner = llm.engine.core.runner
    logits = runner.logits(runner.run([RowSpan(row, 0, count, count)]))
    with torch.inference_mode():
        exact = exact_oracle(torch.tensor([tokens])).logits[0]
        theirs = oracle(torch.tensor([tokens])).logits[0]
    assert exact.dtype == torch.float64
    assert (logits - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    if llm.engine.config.backend == "reference":  # the same torch calls in the same order
        assert (logits - theirs).abs().max() <= 1e-4


def test_it_knows_the_capital_of_france() -> None:
    llm = LLM("smollm2-135m", max_model_len=512)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
