"""ExLlamaV2: dynamic generator (paged, continuous batching) over EXL2 4-bit weights made by its own converter.

Archived in favour of exllamav3; written from its documentation; not yet run on a GPU.
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
    name="exllamav2",
    title="ExLlamaV2",
    url="https://github.com/turboderp-org/exllamav2/blob/master/doc/dynamic.md",
    setting="dynamic generator, EXL2 at 4.0 bits a weight; not yet run on a GPU",
    precisions={"cuda": ("int4",)},
    batching="continuous",
    install={"cuda": (Install(("torch",)), Install(("exllamav2==0.3.2", "flash-attn")))},
    modules=("exllamav2",),
    adapter="ExLlamaV2",
)


class ExLlamaV2(Adapter):
    info = INFO
    converter = "exllamav2.conversion.convert_exl2"

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, "-m", cls.converter, "-i", str(weights), "-o", work, "-cf", str(out), "-b", "4.0"]
            subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import exllamav2
        from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler
        from exllamav2.version import __version__

        config = exllamav2.ExLlamaV2Config(str(model))
        config.max_seq_len = options.max_context
        loaded = exllamav2.ExLlamaV2(config)
        cache = exllamav2.ExLlamaV2Cache(loaded, max_seq_len=_pages(options), lazy=True)
        loaded.load_autosplit(cache)
        self.options, self.job = options, ExLlamaV2DynamicJob
        self.settings = ExLlamaV2Sampler.Settings.greedy()
        self.generator = ExLlamaV2DynamicGenerator(
            model=loaded, cache=cache, tokenizer=exllamav2.ExLlamaV2Tokenizer(config), max_batch_size=options.max_concurrency
        )
        return {"version": f"exllamav2 {__version__}", "flags": "EXL2 4.0 bits"}

    def generate(self, recorder: Recorder) -> None:
        import torch

        def add(index: int, request: Request) -> None:
            stop = [] if request.ignore_eos else list(self.options.eos_token_ids)
            job = self.job(
                input_ids=torch.tensor([request.token_ids]),
                max_new_tokens=request.max_tokens,
                stop_conditions=stop,
                gen_settings=self.settings,
                identifier=index,
            )
            self.generator.enqueue(job)

        def step() -> bool:
            for result in self.generator.iterate():
                if result["stage"] == "streaming" and "token_ids" in result:
                    recorder.tokens(result["identifier"], result["token_ids"][0].tolist())
            return bool(self.generator.num_remaining_jobs())

        run_steps(recorder, add, step)


def _pages(options: LoadOptions) -> int:
    """Tokens of cache for all sequences, in whole pages of 256."""
    return -(-options.max_context // 256) * 256 * options.max_concurrency
