"""`minfer generate` on a tiny model, against transformers; once on the real one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_flags import TINY

import minfer as package

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> tuple[list[int], list[int], str]:
    """(prompt ids, ids, text) of transformers' greedy continuation by 12 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    new = out[prompt.shape[1] :]
    return prompt[0].tolist(), new, tokenizer.decode(new, skip_special_tokens=True)


def test_streams_the_text(minfer: Callable, tiny_llama: Path, expected: tuple) -> None:
    ran = minfer("generate", tiny_llama, PROMPT, "--temperature", 0, "--max-tokens", 12, "--ignore-eos", *TINY)
    assert ran.code == 0, ran.err
    assert ran.out == expected[2] + "\n"
    assert "loaded" in ran.err
    assert "12 tokens" in ran.err
    assert "length" in ran.err


def test_json(minfer: Callable, tiny_llama: Path, expected: tuple) -> None:
    flags = ["--temperature", 0, "--max-tokens", 12, "--ignore-eos", "--logprobs", 2, "--prompt-logprobs", 0]
    values = minfer("generate", tiny_llama, PROMPT, "--json", *flags, *TINY).json
    prompt, ids, text = expected
    assert (values["token_ids"], values["text"], values["finish_reason"]) == (ids, text, "length")
    assert (values["prompt_tokens"], values["completion_tokens"]) == (len(prompt), 12)
    assert values["outputs"][0]["token_ids"] == ids
    assert [position[0]["token_id"] for position in values["logprobs"]] == ids
    assert all(len(position) in (2, 3) and position[0]["rank"] == 1 for position in values["logprobs"])
    assert values["cumulative_logprob"] == pytest.approx(sum(position[0]["logprob"] for position in values["logprobs"]))
    assert values["prompt_logprobs"][0] is None
    assert [position[0]["token_id"] for position in values["prompt_logprobs"][1:]] == prompt[1:]
    times = values["timings"]
    assert 0 < times["time_to_first_token_s"] <= times["total_s"]
    assert times["tokens_per_s"] == pytest.approx(1 / times["time_per_output_token_s"])
    assert values["load_seconds"]["total"] >= values["load_seconds"]["read weights"] > 0


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_prompt_from_stdin(minfer: Callable, tiny_llama: Path, expected: tuple, monkeypatch: pytest.MonkeyPatch, arguments: list) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    ran = minfer("generate", tiny_llama, *arguments, "--json", "--temperature", 0, "--max-tokens", 12, "--ignore-eos", *TINY)
    assert ran.json["prompt"] == PROMPT
    assert ran.json["token_ids"] == expected[1]


def test_stop_text(minfer: Callable, tiny_llama: Path, expected: tuple) -> None:
    stop = expected[2][4:7]
    ran = minfer("generate", tiny_llama, PROMPT, "--json", "--temperature", 0, "--max-tokens", 12, "--ignore-eos", "--stop", stop, *TINY)
    assert ran.json["text"] == expected[2][: expected[2].index(stop)]
    assert (ran.json["finish_reason"], ran.json["stop_reason"]) == ("stop", stop)


def test_chat_goes_through_the_template(minfer: Callable, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    templated = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    ran = minfer("generate", tiny_llama, PROMPT, "--chat", "--json", "--max-tokens", 1, *TINY)
    assert ran.json["prompt_tokens"] == len(templated)


def test_several_answers(minfer: Callable, tiny_llama: Path) -> None:
    flags = ["-v", "--n", 3, "--seed", 5, "--max-tokens", 6, *TINY]
    answers = minfer("generate", tiny_llama, PROMPT, "--json", *flags).json["outputs"]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 3
    ran = minfer("generate", tiny_llama, PROMPT, *flags)
    assert ran.out == "".join(answer["text"] + "\n" for answer in answers)
    assert "answer 3 of 3" in ran.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logprobs", 1], "add --json"),
        (["--top-p", 3], "top_p"),
        (["--block-size", 3], "power of two"),
        (["--max-model-len", 2], "maximum context length is 2"),
        (["--load-format", "nope"], "load_format"),
        (["--kv-cache-memory", "1X"], "--kv-cache-memory"),
    ],
)
def test_what_cannot_be_done_is_said(minfer: Callable, tiny_llama: Path, flags: list, message: str) -> None:
    settings = TINY if "--kv-cache-memory" not in flags else []
    ran = minfer("generate", tiny_llama, PROMPT, *settings, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_random_weights_have_no_tokenizer(minfer: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    ran = minfer("generate", tmp_path, "hi", "--load-format", "dummy", *TINY)
    assert ran.code == 2
    assert "tokenizer" in ran.err


def test_ctrl_c_ends_the_program_quietly(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama", max_position_embeddings=16384)
    arguments = ["generate", str(folder), PROMPT, "--ignore-eos", "--max-tokens", "16000", *map(str, TINY)]
    process = subprocess.Popen(
        [sys.executable, "-m", "minfer", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(package.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)  # the answer has begun
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_the_real_model(minfer: Callable, smollm2_gguf: Path) -> None:
    values = minfer("generate", "smollm2-135m", "The capital of France is", "--json", "--temperature", 0, "--max-tokens", 1).json
    assert values["text"] == " Paris"
    assert values["load_seconds"]["total"] > 0
