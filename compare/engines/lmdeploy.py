"""LMDeploy: its TurboMind engine through `pipeline.stream_infer`, one thread a request.

Setting: https://lmdeploy.readthedocs.io/en/latest/inference/turbomind_config.html. Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, source
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="lmdeploy",
    title="LMDeploy (TurboMind)",
    url="https://lmdeploy.readthedocs.io/en/latest/inference/turbomind_config.html",
    setting="pipeline over TurboMind, stream_infer of token ids; not yet run on a GPU",
    precisions={"cuda": ("bf16", "fp16")},
    batching="continuous",
    prefix_caching=True,
    install={"cuda": (Install(("lmdeploy",)),)},
    modules=("lmdeploy",),
    adapter="LMDeploy",
)


class LMDeploy(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import lmdeploy

        self.lmdeploy, self.options = lmdeploy, options
        config = lmdeploy.TurbomindEngineConfig(
            dtype={"bf16": "bfloat16", "fp16": "float16"}[options.precision],
            session_len=options.max_context,
            max_batch_size=options.max_concurrency,
            enable_prefix_caching=options.prefix_caching,
        )
        self.pipe = lmdeploy.pipeline(str(source(model)), backend_config=config)
        return {"version": f"lmdeploy {lmdeploy.__version__}", "flags": "turbomind"}

    def generate(self, recorder: Recorder) -> None:
        threads = [threading.Thread(target=self._one, args=(recorder, i, r)) for i, r in enumerate(recorder.requests)]
        for index in sorted(range(len(threads)), key=lambda i: recorder.requests[i].arrival):
            recorder.wait_until(recorder.requests[index].arrival)
            threads[index].start()
        for thread in threads:
            thread.join()

    def _one(self, recorder: Recorder, index: int, request: Request) -> None:
        config = self.lmdeploy.GenerationConfig(max_new_tokens=request.max_tokens, do_sample=False, ignore_eos=request.ignore_eos)
        for output in self.pipe.stream_infer([{"input_ids": request.token_ids}], gen_config=config):
            recorder.tokens(index, output.token_ids)
