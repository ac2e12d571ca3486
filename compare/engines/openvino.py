"""OpenVINO GenAI: what a user of an x86 CPU would pick. `ContinuousBatchingPipeline`, stepped, fed with token ids.

Converted by `optimum-cli export openvino`: int8 is per-channel weight compression, int4 is symmetric with groups of 32 (a
group of 128 doesn't divide SmolLM2's 576 columns). Scheduler: the KV cache in GB must be said; 2 GB is more than any case needs.
Setting: https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai.html (LATENCY hint, one stream).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, eos_of, run_steps
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="openvino",
    title="OpenVINO GenAI",
    url="https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai.html",
    setting="ContinuousBatchingPipeline steps, INFERENCE_NUM_THREADS = threads, 2 GB of KV cache, dynamic split-fuse",
    precisions={"cpu": ("int8", "int4", "bf16")},
    batching="continuous",
    scores=True,
    prefix_caching=True,
    install={
        "cpu": (
            Install(
                ("torch==2.13.0", "openvino-genai==2026.4.1.0", "openvino-tokenizers", "openvino", "optimum-intel==2.2.0", "nncf"),
                remove=("torchvision",),
            ),
        )
    },
    modules=("openvino_genai", "optimum.intel"),
    adapter="OpenVino",
)

_FORMATS = {"bf16": ["--weight-format", "fp16"], "int8": ["--weight-format", "int8"]}
_FORMATS["int4"] = ["--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0"]


class OpenVino(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        tool = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        task = ["--task", "text-generation-with-past", *_FORMATS[precision]]
        subprocess.run([*tool, "--model", str(weights), *task, str(out)], check=True, stdout=sys.stderr)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self.genai, self.ov, self.np, self.options = genai, ov, np, options
        self.runs = 0
        self.eos = eos_of(model)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = options.max_concurrency
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = options.prefix_caching
        properties = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipe = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        return {
            "version": f"openvino-genai {genai.__version__}",
            "flags": f"{properties}, dynamic_split_fuse, cache 2 GB",
            "weight_bytes": (model / "openvino_model.bin").stat().st_size,
        }

    def _config(self, **values: Any) -> Any:
        config = self.genai.GenerationConfig()
        config.do_sample = False
        if self.eos:
            config.eos_token_id = self.eos[0]
        for name, value in values.items():
            setattr(config, name, value)
        return config

    def _add(self, token_ids: list[int], config: Any) -> Any:
        self.runs += 1
        tensor = self.ov.Tensor(self.np.array([token_ids], dtype=self.np.int64))
        return self.pipe.add_request(self.runs, tensor, config)

    def generate(self, recorder: Recorder) -> None:
        handles: dict[int, Any] = {}

        def add(index: int, request: Request) -> None:
            config = self._config(max_new_tokens=request.max_tokens, ignore_eos=request.ignore_eos)
            handles[index] = self._add(request.token_ids, config)

        def step() -> bool:
            self.pipe.step()
            for index, handle in list(handles.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        recorder.tokens(index, output.generated_ids)
                if handle.get_status() != self.genai.GenerationStatus.RUNNING and not handle.can_read():
                    del handles[index]
            return bool(self.pipe.has_non_finished_requests())

        run_steps(recorder, add, step)

    def _outputs(self, prompts: list[list[int]], **values: Any) -> list[Any]:
        handles = [self._add(p, self._config(max_new_tokens=1, ignore_eos=True, **values)) for p in prompts]
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
        return [handle.read_all()[0] for handle in handles]

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        out = []
        for window in windows:
            output = self._outputs([window], echo=True, logprobs=1)[0]
            out.append([float(v) for v in output.generated_log_probs[1 : len(window)]])
        return out
