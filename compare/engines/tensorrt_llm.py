"""TensorRT-LLM: its `LLM` API with the PyTorch backend, asynchronous and streaming, fed with token ids.

Setting: https://nvidia.github.io/TensorRT-LLM/performance/perf-overview.html. Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, source
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    url="https://nvidia.github.io/TensorRT-LLM/performance/perf-overview.html",
    setting="LLM.generate_async, streaming, CUDA graphs on; not yet run on a GPU",
    precisions={"cuda": ("bf16", "fp8")},
    batching="continuous",
    prefix_caching=True,
    install={"cuda": (Install(("tensorrt-llm==1.2.1",)),)},
    modules=("tensorrt_llm",),
    adapter="TensorRTLLM",
)


class TensorRTLLM(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import tensorrt_llm
        from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig, QuantAlgo, QuantConfig

        self.api = tensorrt_llm
        self.llm = tensorrt_llm.LLM(
            str(source(model)),
            max_batch_size=options.max_concurrency,
            max_seq_len=options.max_context,
            kv_cache_config=KvCacheConfig(enable_block_reuse=options.prefix_caching),
            cuda_graph_config=CudaGraphConfig(),
            quant_config=QuantConfig(quant_algo=QuantAlgo.FP8) if options.precision == "fp8" else None,
        )
        return {"version": f"tensorrt-llm {tensorrt_llm.__version__}", "flags": "CUDA graphs"}

    def generate(self, recorder: Recorder) -> None:
        async def one(index: int, request: Request) -> None:
            await asyncio.sleep(max(0.0, request.arrival - recorder.now()))
            params = self.api.SamplingParams(
                temperature=0.0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos, detokenize=False
            )
            seen = 0
            async for output in self.llm.generate_async(request.token_ids, params, streaming=True):
                token_ids = output.outputs[0].token_ids
                recorder.tokens(index, token_ids[seen:])
                seen = len(token_ids)

        async def everything() -> None:
            await asyncio.gather(*(one(i, r) for i, r in enumerate(recorder.requests)))

        asyncio.run(everything())
