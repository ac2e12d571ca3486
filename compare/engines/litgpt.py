"""litgpt (Lightning AI; also stands for PyTorch Lightning): its `generate_fn`, one sequence, bf16.

Setting: https://github.com/Lightning-AI/litgpt/blob/main/tutorials/inference.md (`--compile` is for GPUs: on a CPU it compiles
for minutes for every prompt length; it is not used).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, run_one_by_one
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="litgpt",
    title="litgpt (PyTorch Lightning)",
    url="https://github.com/Lightning-AI/litgpt/blob/main/tutorials/inference.md",
    setting="generate_fn with a static KV cache, not compiled",
    precisions={"cpu": ("bf16", "fp32"), "cuda": ("bf16", "fp16")},
    scores=True,
    install={"any": (Install(("torch==2.13.0", "litgpt==0.5.13", "numpy", "safetensors", "transformers")),)},
    modules=("litgpt",),
    adapter="LitGPT",
)

# litgpt builds models from its own table of names; these have the shapes of ours.
_NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct", "llama3.2-1b": "Llama-3.2-1B", "llama2-7b": "Llama-2-7b-hf"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class LitGPT(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

        if weights.name not in _NAMES:
            raise NotImplementedError(f"litgpt has no configuration for {weights.name}")
        for file in weights.iterdir():
            if file.suffix in (".safetensors", ".json"):
                (out / file.name).symlink_to(file)
        convert_hf_checkpoint(out, model_name=_NAMES[weights.name], dtype=_DTYPES[precision])
        for file in out.glob("*.safetensors"):
            file.unlink()

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import litgpt
        import torch
        from litgpt.config import Config
        from litgpt.generate.base import generate_fn

        torch.set_num_threads(options.threads)
        self.torch, self.options, self.generate_fn = torch, options, generate_fn
        with torch.device("meta"):
            self.model = litgpt.GPT(Config.from_checkpoint(model))
        state = torch.load(model / "lit_model.pth", mmap=True, weights_only=True)
        self.model.load_state_dict(state, assign=True)
        self.model.max_seq_length = options.max_context
        # The meta device made the rotary tables empty; the setter above computes them anew on the real one.
        self.model.cos, self.model.sin = self.model.rope_cache(device=torch.device(options.device))
        self.model = self.model.to(options.device, getattr(torch, _DTYPES[options.precision])).eval()
        self.model.set_kv_cache(batch_size=1, max_seq_length=options.max_context, device=torch.device(options.device))
        return {"version": f"litgpt {litgpt.__version__ if hasattr(litgpt, '__version__') else ''}, torch {torch.__version__}", "flags": ""}

    def generate(self, recorder: Recorder) -> None:
        run_one_by_one(recorder, lambda index, request: self._one(recorder, index, request))

    def _one(self, recorder: Recorder, index: int, request: Request) -> None:
        prompt = self.torch.tensor(request.token_ids, device=self.options.device)
        stop = () if request.ignore_eos else tuple([t] for t in self.options.eos_token_ids)
        with self.torch.inference_mode():
            tokens = self.generate_fn(
                self.model,
                prompt,
                len(request.token_ids) + request.max_tokens,
                temperature=0.0,
                top_p=0.0,
                stop_tokens=stop,
                include_prompt=False,
                include_eos=True,
            )
            for token in tokens:
                recorder.token(index, int(token))

    def _logits(self, token_ids: list[int]) -> Any:
        ids = self.torch.tensor([token_ids], device=self.options.device)
        positions = self.torch.arange(len(token_ids), device=self.options.device)
        with self.torch.inference_mode():
            return self.model(ids, positions)[0].float().log_softmax(-1)

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        out = []
        for window in windows:
            targets = self.torch.tensor(window[1:], device=self.options.device)[:, None]
            out.append(self._logits(window)[:-1].gather(1, targets)[:, 0].tolist())
        return out

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        out = []
        for context in contexts:
            best = self._logits(context)[-1].topk(top)
            out.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        return out
