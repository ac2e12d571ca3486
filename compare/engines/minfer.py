"""minfer itself, through its public API: `LLM`, whose `engine` takes requests and steps. Runs in this interpreter.

Quantised cells use llama.cpp's own formats (Q4_0, Q8_0, and the shipped Q4_1 file), so that the two engines run the same bits.
Prefix caching, on by default, is off except where the workload is about it, as for every engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Recorder, run_steps, source
from compare.gguf_export import write_or_share_gguf
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="minfer",
    title="minfer",
    url="docs/architecture.md",
    setting="LLM(...).engine.step(); defaults but for threads, the longest context and prefix caching",
    precisions={"cpu": ("bf16", "fp32", "int8", "int4", "q4_1"), "cuda": ("bf16", "fp16", "fp32")},
    batching="continuous",
    scores=True,
    prefix_caching=True,
    modules=("minfer", "torch", "safetensors", "tokenizers", "gguf"),
    adapter="Minfer",
)

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_GGUF_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "q4_1": "Q4_1"}


class Minfer(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        shipped = weights / "source.gguf"
        if precision not in _GGUF_TYPES:
            super().prepare(weights, precision, out)
        elif precision == "q4_1" and shipped.exists():  # the file the weights came from: the same bits, no second rounding
            (out / "model.gguf").symlink_to(shipped.resolve())
        else:
            write_or_share_gguf(weights, out / "model.gguf", _GGUF_TYPES[precision])

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import torch

        import minfer

        self.minfer, self.options, self.runs = minfer, options, 0
        self.llm = minfer.LLM(
            str(model / "model.gguf" if options.precision in _GGUF_TYPES else source(model)),
            dtype=_DTYPES.get(options.precision, "auto"),
            device=options.device,
            threads=options.threads,
            max_model_len=options.max_context,
            max_num_seqs=options.max_concurrency,
            prefix_caching=options.prefix_caching,
        )
        return {
            "version": f"minfer {minfer.__version__}, torch {torch.__version__}",
            "flags": f"backend {self.llm.engine.config.backend}, max_num_batched_tokens {self.llm.engine.config.max_num_batched_tokens}",
        }

    def generate(self, recorder: Recorder) -> None:
        self.runs += 1
        prefix = f"{self.runs}-"
        engine = self.llm.engine

        def add(index: int, request: Request) -> None:
            params = self.minfer.SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos)
            engine.add_request(prefix + str(index), {"prompt_token_ids": request.token_ids}, params, kind="delta")

        def step() -> bool:
            for output in engine.step():
                for completion in output.outputs:
                    recorder.tokens(int(output.request_id.removeprefix(prefix)), completion.token_ids)
            return engine.has_unfinished_requests

        run_steps(recorder, add, step)

    def _outputs(self, prompts: list[list[int]], **params: Any) -> list[Any]:
        chosen = self.minfer.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, **params)
        return list(self.llm.generate([{"prompt_token_ids": p} for p in prompts], chosen, use_tqdm=False))

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        rows = [output.prompt_logprobs for output in self._outputs(windows, prompt_logprobs=0)]
        return [[row[i][t].logprob for i, t in enumerate(w) if i] for w, row in zip(windows, rows, strict=True)]

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        outputs = self._outputs(contexts, logprobs=top)
        return [{t: v.logprob for t, v in o.outputs[0].logprobs[0].items()} for o in outputs]

    def device_memory(self) -> int | None:
        if self.options.device != "cuda":
            return None
        import torch

        return torch.cuda.max_memory_allocated()
