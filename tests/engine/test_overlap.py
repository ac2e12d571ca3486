"""Steps that overlap give the same outputs as steps that wait, and are launched before the ones ahead of them are waited for.

The device is the CPU, whose compiled kernels give a row the same bits whoever is beside it. It has computed a step when its launch
returns, so what is held here is everything but the waiting itself: who is scheduled before whose token is known, where the token comes
from, and what is thrown away.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from minfer import LLM, SamplingParams
from minfer.engine.async_llm import AsyncLLM
from minfer.kernels import ops
from minfer.kernels.fetch import Arrival, fetch

OPTIONS: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 160, "kv_cache_memory": 2**21, "backend": "cpu"}
PROMPTS = [[(7 * i * i + n) % 500 + 3 for i in range(3 + 5 * n)] for n in range(12)]


def params() -> list[SamplingParams]:
    """One of each kind; the second line of requests makes the loop wait for as long as they run."""
    common: dict[str, Any] = {"max_tokens": 14, "seed": 5}
    return [
        SamplingParams(temperature=0, ignore_eos=True, **common),
        SamplingParams(temperature=1.0, **common),
        SamplingParams(temperature=0.9, top_p=0.8, top_k=40, **common),
        SamplingParams(temperature=1.2, stop=["e", "th"], **common),
        SamplingParams(temperature=1.0, stop_token_ids=list(range(100, 160)), **common),
        SamplingParams(temperature=1.0, n=3, **common),
        SamplingParams(temperature=0.7, logit_bias={40: 3.0, 41: -2.0}, **common),
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, **common),
        SamplingParams(temperature=1.0, logprobs=3, prompt_logprobs=1, **common),
        SamplingParams(temperature=1.0, min_tokens=6, **common),
        SamplingParams(temperature=1.0, bad_words=["the"], **common),
        SamplingParams(temperature=1.0, structured_outputs={"choice": ["a table", "a block"]}, **common),
    ]


def run(model: Path, asked: list[SamplingParams], **options: Any) -> tuple[list[Any], LLM]:
    llm = LLM(str(model), **{**OPTIONS, **options})
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS[: len(asked)]]
    outputs = [output for _ in range(2) for output in llm.generate(prompts, asked, use_tqdm=False)]  # the second time from the cache
    llm.engine.core.scheduler.check_integrity()
    assert llm.engine.core.scheduler.pool.num_used == 0
    return [(output.outputs, output.prompt_logprobs) for output in outputs], llm


@pytest.mark.parametrize("kinds", [slice(0, 7), slice(None)], ids=["that never wait", "mixed"])
@pytest.mark.parametrize("blocks", [40, 400], ids=["preempting", "roomy"])
def test_outputs_are_the_same(tiny_llama: Path, kinds: slice, blocks: int) -> None:
    options: dict[str, Any] = {"block_size": 4, "kv_cache_memory": 512 * 4 * blocks}
    expected, _ = run(tiny_llama, params()[kinds], overlap="off", **options)
    got, llm = run(tiny_llama, params()[kinds], overlap="on", **options)
    assert got == expected
    assert (llm.engine.core.scheduler.stats.num_preemptions > 0) == (blocks == 40)


@pytest.mark.parametrize("kind", ["ngram", "skip"])
def test_drafts_make_every_step_wait(tiny_llama: Path, kind: str) -> None:
    expected, _ = run(tiny_llama, params()[:3], overlap="off")
    got, llm = run(tiny_llama, params()[:3], overlap="on", speculative=kind)
    assert got == expected
    assert not llm.engine.core.overlaps


def order_of(monkeypatch: pytest.MonkeyPatch, model: Path, asked: SamplingParams, **options: Any) -> list[str]:
    """What the engine did, in order: L(aunched) the n-th step, W(aited) for it."""
    events: list[str] = []

    def watched(*tensors: Any) -> Arrival:
        number = sum(event.startswith("L") for event in events)
        events.append(f"L{number}")
        arrival = fetch(*tensors)

        def wait() -> list[Any]:
            events.append(f"W{number}")
            return arrival()

        return wait

    monkeypatch.setattr(ops, "fetch", watched)
    llm = LLM(str(model), **{**OPTIONS, **options})
    llm.generate({"prompt_token_ids": PROMPTS[3]}, asked, use_tqdm=False)
    return events


def test_a_step_is_launched_before_the_one_ahead_of_it_is_waited_for(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    four = {"max_tokens": 4, "ignore_eos": True}
    overlapped, waiting = "L0 L1 W0 L2 W1 L3 W2 W3", "L0 W0 L1 W1 L2 W2 L3 W3"
    for asked, overlap, expected in (
        (SamplingParams(temperature=0, **four), "on", overlapped),
        (SamplingParams(seed=1, **four), "on", overlapped),
        (SamplingParams(temperature=0, presence_penalty=0.5, **four), "on", waiting),
        (SamplingParams(temperature=0, **four), "off", waiting),
        (SamplingParams(temperature=0, **four), "auto", waiting),  # on the CPU
    ):
        assert " ".join(order_of(monkeypatch, tiny_llama, asked, overlap=overlap)) == expected


def test_processors_of_the_caller_make_every_step_wait(tiny_llama: Path) -> None:
    from minfer.engine.engine import Engine

    loaded = LLM(str(tiny_llama), **OPTIONS, overlap="on").engine.core.loaded
    assert Engine(loaded, None).core.overlaps
    assert not Engine(loaded, None, [lambda logits, rows: None]).core.overlaps


def test_a_row_behind_the_end_of_its_request_is_not_counted(tiny_llama: Path) -> None:
    """The step after the one that brought a stop token has a row for nobody; it changes neither the outputs nor the counters of tokens."""
    stopped = [SamplingParams(temperature=1.0, seed=5, max_tokens=40, stop_token_ids=list(range(100, 200)))]
    counted = []
    for overlap in ("off", "on"):
        outputs, llm = run(tiny_llama, stopped, overlap=overlap)
        assert all(completions[0].finish_reason == "stop" for completions, _ in outputs)
        counted.append(llm.engine.core.scheduler.stats.num_computed_tokens)
    assert counted[0] == counted[1]


def test_abort_between_steps_frees_everything_and_harms_nobody(tiny_llama: Path) -> None:
    asked = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (expected, *_), _ = run(tiny_llama, [asked], overlap="off")
    llm = LLM(str(tiny_llama), **OPTIONS, overlap="on")
    engine, scheduler = llm.engine, llm.engine.core.scheduler
    for name, prompt in (("stays", PROMPTS[0]), ("goes", PROMPTS[5])):
        engine.add_request(name, {"prompt_token_ids": prompt}, asked, kind="final")
    for _ in range(5):
        engine.step()
    engine.add_request("scored", {"prompt_token_ids": PROMPTS[9]}, SamplingParams(prompt_logprobs=0), kind="final")
    engine.add_embedding("pooled", PROMPTS[8], "mean")
    engine.step()  # which has launched a step with these two
    used = scheduler.pool.num_used
    gone = {output.request_id: output.outputs[0] for output in engine.abort(["goes", "scored", "pooled"])}
    assert {completion.finish_reason for completion in gone.values()} == {"abort"}
    assert [len(gone[name].token_ids) for name in ("goes", "scored", "pooled")] == [6, 0, 0]
    assert scheduler.pool.num_used < used
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
        scheduler.check_integrity()
    assert [output.outputs for output in outputs] == [expected[0]]
    assert scheduler.pool.num_used == 0


def test_streams_are_the_same(tiny_llama: Path) -> None:
    """The pieces that callers of `AsyncLLM` get, while others come and go."""

    async def stream(llm: AsyncLLM, n: int, asked: SamplingParams) -> list[Any]:
        await asyncio.sleep(0.01 * n)
        return [output.outputs async for output in llm.generate({"prompt_token_ids": PROMPTS[n]}, asked, kind="delta")]

    async def everybody(overlap: str) -> list[Any]:
        llm = AsyncLLM.from_options(str(tiny_llama), **OPTIONS, overlap=overlap)
        try:
            pieces = await asyncio.gather(*(stream(llm, n, asked) for n, asked in enumerate(params())))
            await asyncio.sleep(0.05)
            assert llm.engine.core.scheduler.pool.num_used == 0
            return [_joined(outputs) for outputs in pieces]
        finally:
            llm.shutdown()

    assert asyncio.run(everybody("on")) == asyncio.run(everybody("off"))


def _joined(pieces: list[Any]) -> dict[int, tuple[str, list[int], Any]]:
    whole: dict[int, tuple[str, list[int], Any]] = {}
    for piece in (completion for outputs in pieces for completion in outputs):
        text, ids, _ = whole.get(piece.index, ("", [], None))
        whole[piece.index] = text + piece.text, ids + piece.token_ids, (piece.finish_reason, piece.stop_reason)
    return whole


def test_the_next_call_begins_where_the_last_one_left_a_step_under_way(tiny_llama: Path) -> None:
    """A request that ends by a stop token leaves a step behind; what comes after it, however long, is served as if it weren't there."""
    llm = LLM(str(tiny_llama), **OPTIONS, overlap="on")
    free = LLM(str(tiny_llama), **OPTIONS, overlap="off")
    reasons = set()
    for n in range(8):
        asked = SamplingParams(temperature=1.0, seed=n, max_tokens=40, stop_token_ids=list(range(100, 110)))
        (got,), (expected,) = (each.generate({"prompt_token_ids": PROMPTS[n]}, asked, use_tqdm=False) for each in (llm, free))
        assert got.outputs == expected.outputs
        reasons.add(got.outputs[0].finish_reason)
    assert reasons == {"stop", "length"}
