"""ExLlamaV3: its `Generator` over EXL3 4-bit weights made by its own converter.

Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, run_steps
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="exllamav3",
    title="ExLlamaV3",
    url="https://github.com/turboderp-org/exllamav3",
    setting="Generator, EXL3 at 4.0 bits a weight; not yet run on a GPU",
    precisions={"cuda": ("int4",)},
    batching="continuous",
    install={"cuda": (Install(("torch",)), Install(("exllamav3==1.6.5",)))},
    modules=("exllamav3",),
    adapter="ExLlamaV3",
)
PAGE = 256


class ExLlamaV3(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            command = [
                sys.executable,
                "-m",
                "exllamav3.conversion.convert_model",
                "-i",
                str(weights),
                "-o",
                str(out),
                "-w",
                work,
                "-b",
                "4.0",
            ]
            subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import exllamav3
        from exllamav3 import Cache, Config, Generator, GreedySampler, Job, Model, Tokenizer

        config = Config.from_directory(str(model))
        loaded = Model.from_config(config)
        tokens = -(-options.max_context // PAGE) * PAGE * options.max_concurrency
        cache = Cache(loaded, max_num_tokens=tokens)
        loaded.load()
        self.options, self.job, self.sampler = options, Job, GreedySampler()
        self.generator = Generator(
            model=loaded, cache=cache, tokenizer=Tokenizer.from_config(config), max_batch_size=options.max_concurrency
        )
        return {"version": f"exllamav3 {getattr(exllamav3, '__version__', '')}", "flags": "EXL3 4.0 bits"}

    def generate(self, recorder: Recorder) -> None:
        import torch

        def add(index: int, request: Request) -> None:
            stop = [] if request.ignore_eos else list(self.options.eos_token_ids)
            job = self.job(
                input_ids=torch.tensor([request.token_ids]),
                max_new_tokens=request.max_tokens,
                stop_conditions=stop,
                sampler=self.sampler,
                identifier=index,
            )
            self.generator.enqueue(job)

        def step() -> bool:
            for result in self.generator.iterate():
                if result["stage"] == "streaming" and "token_ids" in result:
                    recorder.tokens(result["identifier"], result["token_ids"][0].tolist())
            return bool(self.generator.num_remaining_jobs())

        run_steps(recorder, add, step)
