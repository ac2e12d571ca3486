from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_flags import TINY

import minfer as package
from minfer.cli.measure import HOST_PARTS, Shape, measure, peak_memory

SHAPE = ["--prompt-tokens", 24, "--output-tokens", 6, "--repeats", 2, "--warmup", 1]


def test_json_holds_what_was_measured(minfer: Callable, tiny_llama: Path) -> None:
    values = minfer("bench", tiny_llama, "--load-format", "dummy", "--batch-size", 3, "--json", *SHAPE, *TINY).json
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "time_per_output_token_s", "total_s"):
        low, high = values["min_max"][name]
        assert 0 < low <= values[name] <= high, name
    assert values["peak_memory_bytes"] > 50 << 20
    assert (values["cached_prompt_tokens"], values["preemptions"], values["repeats"]) == (0, 0, 2)
    # 24 + 6 tokens are 2 blocks of 16; a token takes K and V of 2 layers, 2 heads of 16, in float32.
    assert values["kv_bytes_used"] == 3 * 2 * 16 * (2 * 2 * 2 * 16 * 4)
    assert values["kv_cache_bytes"] <= 16 << 20
    host = values["host_ms_per_decode_step"]
    assert set(host) == {*HOST_PARTS, "output", "total"}
    assert host["total"] == pytest.approx(sum(host[part] for part in (*HOST_PARTS, "output")))
    assert all(host[part] > 0 for part in HOST_PARTS)


def test_the_numbers_of_one_run_agree(minfer: Callable, tiny_llama: Path) -> None:
    flags = ["--load-format", "dummy", "--batch-size", 3, "--prompt-tokens", 24, "--output-tokens", 6, "--repeats", 1]
    values = minfer("bench", tiny_llama, "--json", *flags, *TINY).json
    step = values["time_per_output_token_s"]
    assert values["decode_tokens_per_s"] * step == pytest.approx(3)  # the three requests decode together
    assert values["time_to_first_token_s"] <= 3 * 24 / values["prefill_tokens_per_s"]
    assert values["total_s"] == pytest.approx(3 * 24 / values["prefill_tokens_per_s"] + 5 * step)
    assert values["host_ms_per_decode_step"]["total"] / 1e3 < step


def test_text(minfer: Callable, tiny_llama: Path) -> None:
    ran = minfer("bench", tiny_llama, "--load-format", "dummy", *SHAPE, *TINY)
    assert ran.code == 0
    for row in ("prefill", "decode", "first token", "host per decode step", "peak memory", "KV cache"):
        assert f"\n{row} " in ran.out


def test_one_output_token_has_no_decode(minfer: Callable, tiny_llama: Path) -> None:
    flags = ["--load-format", "dummy", "--output-tokens", 1, "--prompt-tokens", 8, "--repeats", 1, *TINY]
    values = minfer("bench", tiny_llama, "--json", *flags).json
    assert values["prefill_tokens_per_s"] > 0
    assert values["decode_tokens_per_s"] is None
    assert values["host_ms_per_decode_step"] is None
    assert "not measured" in minfer("bench", tiny_llama, *flags).out


def test_tokens_are_counted_once(tiny_llama: Path) -> None:
    """Also when the batch is admitted over several steps, some requests decode while others prefill, and some are preempted."""
    from minfer import LLM

    options = {"load_format": "dummy", "dtype": "float32", "threads": 1, "max_num_batched_tokens": 16, "max_num_seqs": 8}
    engine = LLM(str(tiny_llama), kv_cache_memory=1 << 20, **options).engine
    run = measure(engine, Shape(20, 7, 5), random.Random(0))
    assert run.prefill_tokens == 100
    assert len(run.first_token_s) == 5
    assert all(0 < seconds <= run.prefill_s for seconds in run.first_token_s)
    assert 0 < run.decode_tokens < 5 * 7  # the first requests have made tokens before the last one began
    assert not engine.has_unfinished_requests
    again = measure(engine, Shape(20, 7, 1), random.Random(0))
    assert (again.decode_tokens, again.decode_steps) == (6, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt-tokens", 510, "--output-tokens", 3], "context of 512"),
        (["--batch-size", 65], "--max-num-seqs 65"),
    ],
)
def test_what_cannot_be_measured(minfer: Callable, tiny_llama: Path, flags: list, message: str) -> None:
    ran = minfer("bench", tiny_llama, "--load-format", "dummy", *flags, *TINY)
    assert ran.code == 2
    assert message in ran.err


def test_too_small_a_cache_is_said(minfer: Callable, tiny_llama: Path) -> None:
    flags = ["--load-format", "dummy", "--threads", 1, "--dtype", "float32", "--max-model-len", 64, "--kv-cache-memory", 64 << 10]
    shape = ["--batch-size", 4, "--prompt-tokens", 24, "--output-tokens", 30, "--repeats", 1, "--warmup", 0]
    ran = minfer("bench", tiny_llama, "--json", *shape, *flags)
    assert ran.json["preemptions"] > 0
    assert "preempted" in ran.err


def test_peak_memory_is_this_process_own() -> None:
    """A child that allocates 64 MiB reports that, and not what the large process that started it has used."""
    code = "from minfer.cli.measure import peak_memory; a = peak_memory(); b = b'x' * (64 << 20); print(a, peak_memory())"
    root = Path(package.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    before, after = map(int, ran.stdout.split())
    assert 60 << 20 <= after - before <= 80 << 20
    assert after < peak_memory()


def test_speculation_is_counted(minfer: Callable, tiny_llama: Path) -> None:
    flags = ["--load-format", "dummy", "--prompt-tokens", 24, "--output-tokens", 40, "--repeats", 2, *TINY]
    assert minfer("bench", tiny_llama, "--json", *flags).json["speculation"] is None
    drafting = [*flags, "--speculative", "ngram", "--no-adaptive-drafts", "--num-draft-tokens", 3, "--ngram-min-match", 1]
    counts = minfer("bench", tiny_llama, "--json", *drafting).json["speculation"]
    assert counts["draft_tokens"] >= counts["drafts"] > 0
    assert counts["accepted_tokens"] == sum(counts["accepted_at"]) <= counts["draft_tokens"]
    assert len(counts["accepted_at"]) == 3
    assert counts["mean_accepted_length"] == pytest.approx(1 + counts["accepted_tokens"] / counts["drafts"])
    assert counts["estimated_speedup"] is None  # no step went without drafts, so nothing is known of those
    out = minfer("bench", tiny_llama, *drafting).out
    assert "\nguessed ahead " in out
    assert "\ntokens a draft step " in out
    adaptive = [flag for flag in drafting if flag != "--no-adaptive-drafts"]
    assert minfer("bench", tiny_llama, "--json", *adaptive).json["speculation"]["estimated_speedup"] > 0


def test_a_simulated_gpu(minfer: Callable) -> None:
    flags = ["--simulate", "h200", "--quant", "int4", "--tokenizer", "smollm2-135m", "--max-num-seqs", 8, "--max-model-len", 256]
    shape = ["--prompt-tokens", 16, "--output-tokens", 24, "--batch-size", 8]
    values = minfer("bench", "qwen2.5-0.5b", "--overlap", "on", "--json", *flags, *shape).json
    assert (values["gpu"], values["weights"], values["overlap"], values["text"]) == ("h200", "int4", True, True)
    assert values["steps"] == 24 - 1 - 5  # decode steps but the first three and the last two
    for name in ("step_ms", "device_ms", "host_ms", "launch_ms"):
        middle, high = values[name]
        assert 0 < middle <= high
    assert all(values["host_parts_ms"][part][0] > 0 for part in (*HOST_PARTS, "forward", "output"))
    ran = minfer("bench", "qwen2.5-0.5b", *flags, *shape)
    for row in ("step", "device busy", "device idle", "host, part by part"):
        assert f"\n{row} " in ran.out


def test_what_a_simulated_gpu_cannot_have(minfer: Callable) -> None:
    assert "h100, h200" in minfer("bench", "smollm2-135m", "--simulate", "tpu").err
    assert "--quant none, fp8 and int4" in minfer("bench", "smollm2-135m", "--simulate", "h100", "--quant", "nf4").err
