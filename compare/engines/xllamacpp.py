"""llama.cpp from the prebuilt `xllamacpp` wheel, for machines without a compiler: llama.cpp's own server, in this process.

The server does continuous batching and keeps one slot per request. Its streamed events hold text and the number of tokens so
far, so token ids and log-probabilities are not known (the row `llamacpp` has them). Files are made by the `gguf` package, which
has no K-quants; the wheel's code picks the CPU's instructions at run time.
Setting: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md (`-fa on`, `-np`, `-t` = cores).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder
from compare.gguf_export import write_gguf
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="xllamacpp",
    title="llama.cpp (prebuilt wheel, its server)",
    url="https://github.com/xorbitsai/xllamacpp",
    setting="llama.cpp's server in this process, flash attention on, one slot a request, prompt cache off",
    precisions={"cpu": ("bf16", "int8", "int4", "q4_1")},
    batching="continuous",
    ids=False,
    prefix_caching=True,
    install={"cpu": (Install(("xllamacpp==2026.10.11549", "gguf==0.19.0", "numpy")),)},
    modules=("xllamacpp", "gguf"),
    adapter="XLlamaCpp",
)

_ELEMENTS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0", "q4_1": "Q4_1"}


class XLlamaCpp(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        write_gguf(weights, out / "model.gguf", _ELEMENTS[precision], vocabulary=True)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model / "model.gguf")
        params.n_parallel = options.max_concurrency
        params.n_ctx = options.max_context * options.max_concurrency
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        params.cache_prompt = options.prefix_caching
        params.cache_ram_mib = 0  # no second store of prompts in memory
        params.n_threads_http = options.max_concurrency + 1
        self.options, self.server = options, xllamacpp.Server(params)
        return {"version": f"xllamacpp {xllamacpp.__version__}", "flags": "flash_attn on, kv_unified off"}

    def generate(self, recorder: Recorder) -> None:
        threads = [threading.Thread(target=self._one, args=(recorder, i, r)) for i, r in enumerate(recorder.requests)]
        for index in sorted(range(len(threads)), key=lambda i: recorder.requests[i].arrival):
            recorder.wait_until(recorder.requests[index].arrival)
            threads[index].start()
        for thread in threads:
            thread.join()

    def _one(self, recorder: Recorder, index: int, request: Request) -> None:
        seen, failed = 0, []

        def receive(event: dict[str, Any]) -> bool:
            nonlocal seen
            if "error" in event:
                failed.append(str(event["error"]))
            made = event.get("timings", {}).get("predicted_n", seen)
            recorder.tokens(index, [0] * (made - seen))  # a chunk holds several tokens where one ends inside a character
            seen = made
            return False  # go on

        self.server.handle_completions(
            {
                "prompt": request.token_ids,
                "n_predict": request.max_tokens,
                "temperature": 0.0,
                "top_k": 1,
                "samplers": ["top_k"],
                "ignore_eos": request.ignore_eos,
                "cache_prompt": self.options.prefix_caching,
                "timings_per_token": True,
                "stream": True,
            },
            receive,
        )
        if failed:
            raise RuntimeError(failed[0])
