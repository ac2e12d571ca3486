"""Hugging Face transformers: `generate` in bf16 with its default (SDPA) attention; fp32 is every other engine's reference.

It takes static batches, left-padded. Times come from a stopping criterion, which sees each token as soon as it is appended.
Setting: https://huggingface.co/docs/transformers/llm_optims (a static cache with torch.compile is faster on GPUs and slower
on CPUs, where compiling costs minutes a shape; it is not used here).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, run_batches, source
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="transformers",
    title="Hugging Face transformers",
    url="https://huggingface.co/docs/transformers/llm_optims",
    setting="generate(), SDPA attention, dynamic cache, left-padded static batches",
    precisions={"cpu": ("bf16", "fp32"), "cuda": ("bf16", "fp16", "fp32")},
    batching="static",
    scores=True,
    install={
        "cpu": (Install(("torch==2.13.0", "transformers==5.23.0", "numpy")),),
        "cuda": (Install(("torch", "transformers==5.23.0", "accelerate", "numpy")),),
    },
    modules=("transformers", "torch"),
    adapter="Transformers",
)


class Transformers(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.precision]
        self.torch, self.options = torch, options
        self.model = transformers.AutoModelForCausalLM.from_pretrained(source(model), dtype=dtype).to(options.device).eval()
        self.model.generation_config.pad_token_id = 0
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return {
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "flags": f"attention {self.model.config._attn_implementation}",
            "weight_bytes": weight_bytes,
        }

    def generate(self, recorder: Recorder) -> None:
        batch_size = self.options.max_concurrency
        run_batches(recorder, batch_size, lambda batch: self._batch(recorder, batch))

    def _batch(self, recorder: Recorder, batch: list[int]) -> None:
        torch = self.torch
        requests = [recorder.requests[i] for i in batch]
        width = max(len(r.token_ids) for r in requests)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, width - len(request.token_ids) :] = 1
        done = [False] * len(batch)
        stop_ids = () if requests[0].ignore_eos else self.options.eos_token_ids

        def stamp(tokens: Any, scores: Any, **_: Any) -> Any:
            for row, token in enumerate(tokens[:, -1].tolist()):
                if not done[row]:
                    recorder.token(batch[row], token)
                    done[row] = token in stop_ids
            return torch.tensor(done, device=tokens.device)

        with torch.inference_mode():
            self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=requests[0].max_tokens,
                do_sample=False,
                eos_token_id=None,
                stopping_criteria=[stamp],
            )

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        torch, out = self.torch, []
        for window in windows:
            ids = torch.tensor([window], device=self.model.device)
            with torch.inference_mode():
                logits = self.model(ids).logits[0, :-1].float()
            out.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
        return out

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        torch, out = self.torch, []
        for context in contexts:
            with torch.inference_mode():
                logits = self.model(torch.tensor([context], device=self.model.device), logits_to_keep=1).logits[0, -1].float()
            best = logits.log_softmax(-1).topk(top)
            out.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        return out

    def device_memory(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.options.device == "cuda" else None
