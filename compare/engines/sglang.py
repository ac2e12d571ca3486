"""SGLang: its offline `Engine`, asynchronous and streaming, fed with token ids; radix cache off unless the workload is about it.

Setting: https://docs.sglang.io/advanced_features/hyperparameter_tuning.html. Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, source
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="sglang",
    title="SGLang",
    url="https://docs.sglang.io/advanced_features/hyperparameter_tuning.html",
    setting="Engine.async_generate, streaming; defaults (CUDA graphs, FlashInfer or FA3); not yet run on a GPU",
    precisions={"cuda": ("bf16", "fp8")},
    batching="continuous",
    scores=True,
    prefix_caching=True,
    install={"cuda": (Install(("sglang",)),)},
    modules=("sglang",),
    adapter="SGLang",
)


class SGLang(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import sglang

        self.engine = sglang.Engine(
            model_path=str(source(model)),
            dtype="bfloat16",
            quantization="fp8" if options.precision == "fp8" else None,
            context_length=options.max_context,
            max_running_requests=options.max_concurrency,
            disable_radix_cache=not options.prefix_caching,
        )
        return {"version": f"sglang {sglang.__version__}", "flags": ""}

    def generate(self, recorder: Recorder) -> None:
        async def one(index: int, request: Request) -> None:
            await asyncio.sleep(max(0.0, request.arrival - recorder.now()))
            params = {"temperature": 0.0, "max_new_tokens": request.max_tokens, "ignore_eos": request.ignore_eos}
            seen = 0
            stream = await self.engine.async_generate(input_ids=request.token_ids, sampling_params=params, stream=True)
            async for chunk in stream:  # each holds all ids so far
                recorder.tokens(index, chunk["output_ids"][seen:])
                seen = len(chunk["output_ids"])

        async def everything() -> None:
            await asyncio.gather(*(one(i, r) for i, r in enumerate(recorder.requests)))

        asyncio.get_event_loop().run_until_complete(everything())

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        params = {"temperature": 0.0, "max_new_tokens": 1}
        outputs = self.engine.generate(input_ids=windows, sampling_params=params, return_logprob=True, logprob_start_len=0)
        return [[float(entry[0]) for entry in o["meta_info"]["input_token_logprobs"][1:]] for o in outputs]
