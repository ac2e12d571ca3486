"""Systems that the comparison tables name and that have no adapter: each row says why."""

from __future__ import annotations

from compare.engines.base import EngineInfo


def _row(name: str, title: str, url: str, reason: str, *, server: bool = False) -> EngineInfo:
    return EngineInfo(name=name, title=title, url=url, reason=reason, server=server)


_SERVER = "start its server and give the address: --against openai=http://HOST:PORT/v1"
_RUST = "a Rust library with example programs, no engine with a stable interface; no package for Python with its language models"
_PAPER = "a research prototype for a CUDA cluster; its ideas are in today's engines ({}), which stand in this table"

LISTED: tuple[EngineInfo, ...] = (
    _row("ollama", "Ollama", "https://github.com/ollama/ollama", _SERVER, server=True),
    _row("tgi", "Text Generation Inference", "https://github.com/huggingface/text-generation-inference", _SERVER, server=True),
    _row("openllm", "OpenLLM", "https://github.com/bentoml/OpenLLM", _SERVER + " (it runs vLLM inside)", server=True),
    _row("llama-server", "llama.cpp server", "https://github.com/ggml-org/llama.cpp", _SERVER, server=True),
    _row(
        "lightning",
        "PyTorch Lightning",
        "https://github.com/Lightning-AI/pytorch-lightning",
        "its inference engine is litgpt: see that row",
    ),
    _row("candle", "candle", "https://github.com/huggingface/candle", _RUST),
    _row("burn", "Burn", "https://github.com/tracel-ai/burn", _RUST),
    _row(
        "powerinfer",
        "PowerInfer",
        "https://github.com/SJTU-IPADS/PowerInfer",
        "needs models retrained with ReLU and a predictor file for each; it cannot run the same weights",
    ),
    _row(
        "bitnet.cpp",
        "bitnet.cpp",
        "https://github.com/microsoft/BitNet",
        "runs models trained with ternary weights only; it cannot run the same weights",
    ),
    _row(
        "llama2.c",
        "llama2.c",
        "https://github.com/karpathy/llama2.c",
        "a single C file without a package; fp32 or int8, one sequence, its own weight format; kept as a teaching reference",
    ),
    _row("nanoflow", "NanoFlow", "https://github.com/efeslab/Nanoflow", _PAPER.format("overlap of operations inside a step")),
    _row("distserve", "DistServe", "https://github.com/LLMServe/DistServe", _PAPER.format("vLLM and SGLang split prefill from decode")),
    _row(
        "vattention",
        "vAttention",
        "https://github.com/microsoft/vattention",
        _PAPER.format("virtual-memory KV cache, needs a patched driver"),
    ),
    _row(
        "sarathi-serve", "Sarathi-Serve", "https://github.com/microsoft/sarathi-serve", _PAPER.format("chunked prefill is vLLM's default")
    ),
    _row("auto-gptq", "AutoGPTQ", "https://github.com/AutoGPTQ/AutoGPTQ", "archived; gptqmodel is its successor and has a row"),
    _row("nano-vllm", "nano-vllm", "https://github.com/GeeeekExplorer/nano-vllm", "not a package; needs CUDA and flash-attn"),
    _row("mini-sglang", "mini-sglang", "https://github.com/sgl-project/mini-sglang", "not a package; needs CUDA and flashinfer"),
    _row("gpt-fast", "gpt-fast", "https://github.com/meta-pytorch/gpt-fast", "a script to copy, not a package; one sequence"),
    _row("mlx", "MLX", "https://github.com/ml-explore/mlx-lm", "Apple silicon only"),
)
