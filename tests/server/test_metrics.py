"""/metrics: read as Prometheus reads it; exact counts, and gauges that come back to zero."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import load, post, slow_down, wait_until_free
from lora_adapters import write_adapter
from prometheus_client.parser import text_string_to_metric_families

from minfer import AsyncLLM
from minfer.server import ServerOptions
from minfer.server.slot import ModelSlot

ROOT = Path(__file__).parents[2]
COMPLETE = "/v1/completions"
GREEDY = {"temperature": 0, "ignore_eos": True}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(client: httpx.Client, **headers: str) -> Samples:
    """{(name, labels but the model's and the engine's): value}."""
    response = client.get("/metrics", headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: Samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            if ":" in sample.name:
                assert sample.labels["model_name"] == "tiny"
                assert sample.labels["engine"] == "0"
            samples[sample.name, frozenset(labels.items())] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"minfer:{name}", frozenset(labels.items())]


@pytest.fixture
def own(own_llm: AsyncLLM, serve: Any) -> Any:
    with serve(own_llm) as client:
        yield client


def test_counts_are_exact(own: httpx.Client) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 3
    usage = [post(own, COMPLETE, prompt=prompt, max_tokens=6, **GREEDY)["usage"] for _ in range(2)]
    usage.append(post(own, COMPLETE, prompt="A table", max_tokens=4, n=2, **GREEDY)["usage"])
    now = scrape(own)
    for name, count in {
        "time_to_first_token_seconds": 4,
        "inter_token_latency_seconds": 2 * 5 + 2 * 3,
        "request_time_per_output_token_seconds": 4,
        "e2e_request_latency_seconds": 4,
        "request_queue_time_seconds": 4,
        "request_prefill_time_seconds": 4,
        "request_decode_time_seconds": 4,
        "request_inference_time_seconds": 4,
        "request_prompt_tokens": 4,
        "request_generation_tokens": 4,
        "request_params_n": 3,
        "request_params_max_tokens": 3,
    }.items():
        assert value(now, f"{name}_count") == count, name
        assert value(now, f"{name}_bucket", le="+Inf") == count
        assert value(now, f"{name}_sum") > 0
    assert value(now, "request_params_n_bucket", le="1.0") == 2
    assert value(now, "generation_tokens_total") == 6 + 6 + 8
    prompt_tokens = [u["prompt_tokens"] for u in usage]
    assert value(now, "prompt_tokens_total") == prompt_tokens[0] * 2 + prompt_tokens[2] * 2
    cached = usage[1]["prompt_tokens_details"]["cached_tokens"]
    assert value(now, "prefix_cache_hits_total") == cached > 0
    assert value(now, "prompt_tokens_cached_total") == cached + prompt_tokens[2] - 1  # the sibling shares all but the last
    assert value(now, "prefix_cache_queries_total") == prompt_tokens[0] * 2 + prompt_tokens[2]
    assert value(now, "request_success_total", finished_reason="length") == 4
    assert value(now, "request_success_total", finished_reason="abort") == 0
    assert value(now, "num_preemptions_total") == 0
    assert value(now, "iteration_tokens_total_count") == value(now, "engine_steps_total")
    assert sum(v for (name, _), v in now.items() if name == "minfer:engine_step_seconds_total") > 0
    assert now["process_resident_memory_bytes", frozenset()] > 1 << 20
    (info,) = (dict(labels) for name, labels in now if name == "minfer:cache_config_info")
    assert info["block_size"] == "16"
    assert int(info["num_gpu_blocks"]) > 10


def test_gauges_follow_and_return_to_zero_when_clients_leave(own_llm: AsyncLLM, own: httpx.Client) -> None:
    slow_down(own_llm, 0.05)
    with own.stream("POST", COMPLETE, json={"prompt": "A block", "max_tokens": 400, "n": 3, "stream": True, **GREEDY}) as response:
        lines = response.iter_lines()  # letting go of it would close the stream
        next(lines)
        deadline = time.monotonic() + 10
        while value(scrape(own), "num_requests_running") != 3:
            assert time.monotonic() < deadline
        assert 0 < value(scrape(own), "kv_cache_usage_perc") < 1
    wait_until_free(own_llm)
    now = scrape(own)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(now, name) == 0, name
    assert value(now, "request_success_total", finished_reason="abort") == 3


def test_two_servers_in_one_process_share_nothing(own: httpx.Client, llm: AsyncLLM, client: httpx.Client) -> None:
    before = value(scrape(client), "generation_tokens_total")
    post(own, COMPLETE, prompt="a", max_tokens=3, **GREEDY)
    assert value(scrape(own), "generation_tokens_total") == 3
    assert value(scrape(client), "generation_tokens_total") == before


def test_vllms_names_and_the_counters_of_speculation(serve: Any, tiny_llama: Path) -> None:
    llm = load(tiny_llama, speculative="ngram", adaptive_drafts=False, num_draft_tokens=3)
    with serve(llm, metrics_compat="vllm") as client:
        # Nothing to learn from in a fresh model's greedy text: it soon repeats itself, and repetition is what ngram guesses.
        post(client, COMPLETE, prompt="a b a b a b a b", max_tokens=60, **GREEDY)
        now = scrape(client)
        assert not any(name.startswith("minfer:") for name, _ in now)
        stats = llm.engine.core.speculation.stats
        assert stats.num_draft_tokens > 0
        assert now["vllm:spec_decode_num_drafts_total", frozenset()] == stats.num_drafts
        assert now["vllm:spec_decode_num_draft_tokens_total", frozenset()] == stats.num_draft_tokens
        assert now["vllm:spec_decode_num_accepted_tokens_total", frozenset()] == stats.num_accepted_tokens
        at = [now["vllm:spec_decode_num_accepted_tokens_per_pos_total", frozenset({("position", str(n))})] for n in range(3)]
        assert at == stats.accepted_at
        assert sum(at) == stats.num_accepted_tokens
        assert now["vllm:spec_decode_mean_accepted_length", frozenset()] == stats.mean_accepted_length
        assert now["vllm:spec_decode_seconds_gained", frozenset()] == stats.seconds_gained
        assert now["vllm:generation_tokens_total", frozenset()] == 60
    llm.shutdown()


def test_without_speculation_its_names_are_absent(client: httpx.Client) -> None:
    assert "spec_decode" not in client.get("/metrics").text


def adapters_in_use(client: httpx.Client) -> tuple[str, str]:
    ((labels, seconds),) = ((dict(labels), at) for (name, labels), at in scrape(client).items() if name == "vllm:lora_requests_info")
    assert labels["max_lora"] == "2"
    assert seconds > 1.7e9, "vLLM's gauge has the time as its value"
    return labels["running_lora_adapters"], labels["waiting_lora_adapters"]


def test_adapters_that_run_and_wait(serve: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folders = {name: str(write_adapter(tiny_llama, tmp_path / name, seed)) for seed, name in enumerate(("french", "legal"))}
    llm = load(tiny_llama, lora=folders, max_num_seqs=1)
    with serve(llm, metrics_compat="vllm") as client:
        assert adapters_in_use(client) == ("", "")
        slow_down(llm, 0.05)
        asked = {"model": "legal", "prompt": "a", "max_tokens": 1, **GREEDY}
        other = threading.Thread(target=post, args=(client, COMPLETE), kwargs=asked)
        body = {"model": "french", "prompt": "A block", "max_tokens": 400, "stream": True, **GREEDY}
        with client.stream("POST", COMPLETE, json=body) as response:
            lines = response.iter_lines()  # letting go of it would close the stream
            next(lines)
            other.start()
            deadline = time.monotonic() + 20
            while adapters_in_use(client) != ("french", "legal"):
                assert time.monotonic() < deadline
        other.join(30)
        wait_until_free(llm)
        assert adapters_in_use(client) == ("", "")
        tokens = scrape(client)["vllm:lora_tokens_total", frozenset()]
        assert tokens == llm.engine.core.scheduler.stats.num_adapter_tokens > 0
    llm.shutdown()


def test_without_adapters_their_names_are_absent(llm: AsyncLLM, client: httpx.Client) -> None:
    assert "lora" not in client.get("/metrics").text
    llm.engine.core.runner.builder.keys_saved += 64
    assert value(scrape(client), "shared_prefix_keys_saved_total") == 64


def test_answers_while_loading_and_asks_for_the_key(serve: Any) -> None:
    slot = ModelSlot("tiny", ServerOptions())
    with serve(slot, api_key="secret") as client:
        assert client.get("/metrics").status_code == 401
        now = scrape(client, authorization="Bearer secret")
        assert ("process_resident_memory_bytes", frozenset()) in now
        assert {name for name, _ in now if name.startswith("minfer:")} == {
            "minfer:http_requests_total",
            "minfer:requests_refused_total",
            "minfer:requests_in_flight",
        }, "what HTTP has seen so far; of the engine there is nothing to tell"


def test_the_grafana_board_asks_for_what_exists(serve: Any, tiny_llama: Path, tmp_path: Path) -> None:
    llm = load(tiny_llama, speculative="ngram", lora={"french": str(write_adapter(tiny_llama, tmp_path / "french"))})
    with serve(llm) as client:
        post(client, COMPLETE, prompt="a", max_tokens=1)
        names = {name for name, _ in scrape(client)}
    llm.shutdown()
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    asked = {name for expression in expressions for name in re.findall(r"minfer:\w+|process_\w+", expression)}
    assert len(asked) > 15
    assert asked <= names, sorted(asked - names)
    page = (ROOT / "docs" / "observability.md").read_text()
    described = {f"minfer:{name}" for name in re.findall(r"^\| `(\w+)`", page, re.MULTILINE)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names if name.startswith("minfer:")}
    assert described == families, described ^ families
