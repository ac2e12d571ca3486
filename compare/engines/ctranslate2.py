"""CTranslate2: static batches, int8 weights with float32 accumulation; tokens are named, so ids pass through the vocabulary.

`generate_batch` reports each step through a callback only for one sequence; for a batch it gives the result at the end. So a
batch's times are those of `generate_tokens`, its streaming form, which takes a batch and yields every step. A batch holds at
most 16 sequences: 64 prompts of up to 512 tokens at once took more memory than a machine of 24 GB had left.
Setting: https://opennmt.net/CTranslate2/performance.html (int8, intra_threads = cores, static prompt excluded).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, run_batches
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="ctranslate2",
    title="CTranslate2",
    url="https://opennmt.net/CTranslate2/performance.html",
    setting="generate_tokens over static batches of up to 16, intra_threads = threads, one replica; int8_float32 for int8",
    precisions={"cpu": ("int8", "fp32"), "cuda": ("bf16", "int8")},
    batching="static",
    scores=True,
    install={"any": (Install(("torch==2.13.0", "ctranslate2==4.8.5", "transformers==5.23.0", "sentencepiece", "numpy")),)},
    modules=("ctranslate2", "transformers"),
    adapter="CTranslate2",
)

BATCH = 16  # sequences; its performance guide asks for a limit (`max_batch_size`) that suits the memory
_STORED = {"int8": "int8", "bf16": "bfloat16", "fp32": "float32"}
_COMPUTED = {"int8": "int8_float32", "bf16": "bfloat16", "fp32": "float32"}


class CTranslate2(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        tool = [sys.executable, "-m", "ctranslate2.converters.transformers", "--force", "--low_cpu_mem_usage"]
        command = [*tool, "--model", str(weights), "--quantization", _STORED[precision], "--output_dir", str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import ctranslate2

        self.options = options
        compute = _COMPUTED[options.precision]
        self.generator = ctranslate2.Generator(
            str(model), device=options.device, compute_type=compute, intra_threads=options.threads, inter_threads=1
        )
        self.words: list[str] = json.loads((model / "vocabulary.json").read_text())
        self.eos = [self.words[i] for i in options.eos_token_ids]
        return {"version": f"ctranslate2 {ctranslate2.__version__}", "flags": f"compute_type {self.generator.compute_type}"}

    def _words(self, token_ids: list[int]) -> list[str]:
        return [self.words[t] for t in token_ids]

    def generate(self, recorder: Recorder) -> None:
        run_batches(recorder, min(BATCH, self.options.max_concurrency), lambda batch: self._batch(recorder, batch))

    def _batch(self, recorder: Recorder, batch: list[int]) -> None:
        requests = [recorder.requests[i] for i in batch]
        steps = self.generator.generate_tokens(
            [self._words(r.token_ids) for r in requests],
            max_batch_size=0,
            max_length=requests[0].max_tokens,
            sampling_topk=1,
            end_token=[] if requests[0].ignore_eos else self.eos,
        )
        for step in steps:
            recorder.token(batch[step.batch_id], step.token_id)

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        results = self.generator.score_batch([self._words(w) for w in windows], max_batch_size=1)
        return [list(r.log_probs) for r in results]
