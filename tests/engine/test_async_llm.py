"""The engine behind a server: concurrent streams, leaving early, dying, stopping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from minfer import AsyncLLM, RequestOutput, SamplingParams
from minfer.errors import EngineDeadError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture
def llm(tiny_llama: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM.from_options(str(tiny_llama), dtype="float32", threads=1, kv_cache_memory=2**22, graphs=False)
    yield llm
    llm.shutdown()


async def collect(llm: AsyncLLM, prompt: str, params: SamplingParams = GREEDY, **options: Any) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, **options)]


def used_blocks(llm: AsyncLLM) -> int:
    return llm.engine.core.scheduler.pool.num_used


async def until_free(llm: AsyncLLM, limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while used_blocks(llm) or llm.engine.has_unfinished_requests:
        assert time.monotonic() < deadline, "blocks are still in use"
        await asyncio.sleep(0.01)


def test_many_streams_at_once_each_get_their_own(llm: AsyncLLM) -> None:
    async def run() -> None:
        prompts = ["The quick", "A block", "Zwölf", "x"]
        alone = [(await collect(llm, prompt))[-1].outputs[0].text for prompt in prompts]
        together = await asyncio.gather(*(collect(llm, prompt) for prompt in prompts * 3))
        assert [outputs[-1].outputs[0].text for outputs in together] == alone * 3
        assert all(outputs[-1].finished for outputs in together)
        await until_free(llm)

    asyncio.run(run())


def test_deltas_add_up_to_the_cumulative_output(llm: AsyncLLM) -> None:
    async def run() -> None:
        params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=10, ignore_eos=True, logprobs=1)
        deltas = await collect(llm, "A table", params, kind="delta")
        (whole,) = await collect(llm, "A table", params, kind="final")
        for index in (0, 1):
            parts = [c for output in deltas for c in output.outputs if c.index == index]
            final = whole.outputs[index]
            assert "".join(part.text for part in parts) == final.text
            assert [token for part in parts for token in part.token_ids] == final.token_ids
            assert [entry for part in parts for entry in part.logprobs or []] == final.logprobs
            assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]

    asyncio.run(run())


def test_leaving_early_or_being_cancelled_frees_everything(llm: AsyncLLM) -> None:
    async def run() -> None:
        async with aclosing(llm.generate("The", LONG)) as stream:
            async for _ in stream:
                break
        await until_free(llm)
        task = asyncio.create_task(collect(llm, "The", LONG))
        while not used_blocks(llm):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_free(llm)

    asyncio.run(run())


def test_abort_ends_the_stream_with_its_reason(llm: AsyncLLM) -> None:
    async def run() -> None:
        task = asyncio.create_task(collect(llm, "The", LONG, request_id="mine"))
        while not used_blocks(llm):
            await asyncio.sleep(0.001)
        await llm.abort("mine")
        outputs = await asyncio.wait_for(task, 10)
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].finish_reason == "abort"
        await until_free(llm)

    asyncio.run(run())


def test_a_bad_request_harms_nobody_else(llm: AsyncLLM) -> None:
    async def run() -> None:
        good = asyncio.create_task(collect(llm, "The"))
        for bad, params in (("", GREEDY), ("x", SamplingParams(logit_bias={10**6: 1.0}))):
            with pytest.raises(RequestError):
                await collect(llm, bad, params)
        assert (await good)[-1].finished

    asyncio.run(run())


def test_ids_must_be_unique_while_they_run(llm: AsyncLLM) -> None:
    async def run() -> None:
        first = asyncio.create_task(collect(llm, "The", LONG, request_id="same"))
        while not used_blocks(llm):
            await asyncio.sleep(0.001)
        with pytest.raises(RequestError, match="'same' is already running"):
            await collect(llm, "x", request_id="same")
        assert (await first)[-1].finished

    asyncio.run(run())


def test_a_dead_engine_tells_everyone(llm: AsyncLLM) -> None:
    """Those who are being answered, those who wait, and those who come later."""

    async def run() -> None:
        streams = [asyncio.create_task(collect(llm, "The", LONG)) for _ in range(3)]
        while not used_blocks(llm):
            await asyncio.sleep(0.001)

        def fail(*arguments: Any) -> None:
            raise RuntimeError("out of luck")

        llm.engine.core.runner.logits = fail  # type: ignore[method-assign]
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "out of luck" in str(result)
        assert not llm.is_running
        assert used_blocks(llm) == 0
        with pytest.raises(EngineDeadError):
            await collect(llm, "x")

    asyncio.run(run())


def test_shutdown_ends_streams_and_can_be_repeated(llm: AsyncLLM) -> None:
    async def run() -> None:
        stream = asyncio.create_task(collect(llm, "The", LONG))
        while not used_blocks(llm):
            await asyncio.sleep(0.001)
        llm.shutdown()
        llm.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await stream
        with pytest.raises(EngineDeadError):
            await collect(llm, "x")

    asyncio.run(run())


def test_an_idle_engine_uses_no_cpu(llm: AsyncLLM) -> None:
    asyncio.run(collect(llm, "The"))
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.05
