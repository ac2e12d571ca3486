"""ONNX Runtime GenAI: one `Generator` over a static batch; int4 weights are what its own model builder makes for the CPU.

Its `Engine` was tried too (0.18, static batching, greedy answers equal): 16 prompts of mixed lengths took 9.7 s one after
another, 22 s in batches of 4 and 40 s in a batch of 16, because it pads prompts; its continuous batching needs a paged model,
which the builder makes for CUDA only. So prompts of one length share a `Generator`, and the others run one by one.
Setting: https://onnxruntime.ai/docs/genai/ (model builder `-p int4 -e cpu`, accuracy level 4: int8 activations, the builder's
default for the CPU; threads through the session options in genai_config.json).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, run_batches
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="onnxruntime",
    title="ONNX Runtime GenAI",
    url="https://onnxruntime.ai/docs/genai/",
    setting="model builder's int4 for the CPU (accuracy level 4), intra_op_num_threads = threads, batches of prompts of equal length",
    precisions={"cpu": ("int4", "fp32")},
    batching="static",
    scores=True,
    install={"cpu": (Install(("torch==2.13.0", "onnxruntime-genai==0.18.0", "transformers==5.23.0", "onnx", "onnx-ir", "numpy")),)},
    modules=("onnxruntime_genai", "onnx_ir"),
    adapter="OnnxRuntime",
)

PAD = 0


class OnnxRuntime(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        with tempfile.TemporaryDirectory() as cache:
            tool = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", str(weights)]
            command = [*tool, "-o", str(out), "-p", precision, "-e", "cpu", "-c", cache]
            subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import numpy as np
        import onnxruntime_genai as og

        self.og, self.np, self.options = og, np, options
        config_file = model / "genai_config.json"
        config = json.loads(config_file.read_text())
        session = config["model"]["decoder"]["session_options"]
        session["intra_op_num_threads"] = options.threads
        config["model"]["pad_token_id"] = PAD  # the builder takes end-of-text, which a chat prompt contains
        config_file.write_text(json.dumps(config, indent=1))
        self.model = og.Model(str(model))
        return {"version": f"onnxruntime-genai {og.__version__}", "flags": json.dumps(session)}

    def _generator(self, prompts: list[list[int]], length: int, *, ignore_eos: bool = False) -> Any:
        """A generator over prompts of one length. `min_length` keeps end-of-text from ending a sequence before its time."""
        params = self.og.GeneratorParams(self.model)
        shortest = length if ignore_eos else 0
        params.set_search_options(do_sample=False, max_length=length, min_length=shortest, batch_size=len(prompts))
        generator = self.og.Generator(self.model, params)
        rows = self.np.array(prompts, dtype=self.np.int32)
        generator.append_tokens(rows if len(prompts) > 1 else rows[0])
        return generator

    def generate(self, recorder: Recorder) -> None:
        # Left padding changes the answers of the padded rows (its grouped-query attention has no mask for it; seen with
        # 0.18 on two prompts of 17 and 14 tokens), so only prompts of equal length share a batch.
        size = self.options.max_concurrency
        run_batches(recorder, size, lambda batch: self._batch(recorder, batch), alike=lambda r: (r.max_tokens, len(r.token_ids)))

    def _batch(self, recorder: Recorder, batch: list[int]) -> None:
        requests = [recorder.requests[i] for i in batch]
        length = len(requests[0].token_ids) + requests[0].max_tokens
        generator = self._generator([r.token_ids for r in requests], length, ignore_eos=requests[0].ignore_eos)
        done = [False] * len(batch)
        for _ in range(requests[0].max_tokens):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                if not done[row]:
                    recorder.token(batch[row], int(token))
                    done[row] = not requests[row].ignore_eos and int(token) in self.options.eos_token_ids
            if all(done):
                break

    def _log_softmax(self, logits: Any) -> Any:
        shifted = logits.astype(self.np.float64) - logits.max(-1, keepdims=True)
        return shifted - self.np.log(self.np.exp(shifted).sum(-1, keepdims=True))

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        out = []
        for window in windows:
            generator = self._generator([window], len(window) + 1)
            logits = generator.get_output("logits")[0]
            if len(logits) < len(window):
                raise NotImplementedError("this build of ONNX Runtime GenAI gives the logits of the last prompt token only")
            out.append([float(self._log_softmax(logits[i])[t]) for i, t in enumerate(window[1:])])
        return out

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        out = []
        for context in contexts:
            generator = self._generator([context], len(context) + 1)
            logprobs = self._log_softmax(generator.get_output("logits")[0, -1])
            best = self.np.argpartition(-logprobs, top)[:top]
            out.append({int(i): float(logprobs[i]) for i in best})
        return out
