"""What a checkpoint is: `ModelConfig`, and of it the rotary embedding (`RopeConfig`) and the experts (`MoEConfig`).

All are frozen. `ModelConfig.from_hf` is the only reader of a Hugging Face `config.json`; the GGUF loader translates its metadata into the
same keys and goes through it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minfer.errors import ModelLoadError

MAX_EXPERTS = 1024


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched past the trained length. Field names are the config's own.

    kind: default | linear (Chen 2023) | dynamic (NTK by length) | llama3 (by wavelength) | yarn (Peng 2023).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    freq_factors: tuple[float, ...] | None = None  # GGUF ships llama3's effect as a divisor of each frequency

    KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Reads both spellings: `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters` (5)."""
        scaling = dict(config.get("rope_scaling") or {})
        scaling.update(config.get("rope_parameters") or {})
        kind = scaling.get("rope_type", scaling.get("type", "default")) or "default"
        if kind not in cls.KINDS:
            raise ModelLoadError(f"rope scaling {kind!r} in config.json is not supported; supported are {', '.join(cls.KINDS)}")
        if (scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ModelLoadError("partial_rotary_factor in config.json is not supported yet: this model rotates only part of each head")
        theta = scaling.get("rope_theta", config.get("rope_theta"))
        original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        values: dict[str, Any] = {
            "theta": 10000.0 if theta is None else float(theta),
            "kind": kind,
            "original_max_position": int(original) if original else None,
        }
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        ):
            if scaling.get(name) is not None:
                values[name] = float(scaling[name])
        if kind == "yarn" and "factor" not in values:  # DeepSeek's spelling: the ratio is the factor
            values["factor"] = config["max_position_embeddings"] / original
        if scaling.get("truncate") is not None:
            values["truncate"] = bool(scaling["truncate"])
        if config.get("rope_freq_factors") is not None:
            values["freq_factors"] = tuple(float(f) for f in config["rope_freq_factors"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward block: each token goes through `experts_per_token` of `num_experts`.

    norm_topk_prob: the chosen experts' shares of the softmax are divided by their sum. shared_intermediate_size: of an expert that every
    token goes through, behind a gate of its own; 0: there is none. dense_layers: those that have a plain block. block and matrices: what
    the checkpoint calls the mixture inside a layer, and an expert's gate, up and down matrices.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool = True
    shared_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ModelLoadError(f"{name} of the model's mixture of experts must be a positive whole number, not {value!r}")
        if self.num_experts > MAX_EXPERTS:  # a config that lies must not make us list millions of names
            raise ModelLoadError(f"a mixture of {self.num_experts} experts is beyond any model; up to {MAX_EXPERTS} are supported")
        if self.experts_per_token > self.num_experts:
            raise ModelLoadError(f"num_experts_per_tok={self.experts_per_token} is more than the {self.num_experts} experts there are")

    @classmethod
    def from_hf(cls, architecture: str, config: Mapping[str, Any]) -> MoEConfig | None:
        """None for a family without experts."""
        if architecture not in _MOE_ARCHITECTURES:
            return None
        experts = config.get("num_local_experts", config.get("num_experts"))  # transformers 5 writes the former for Qwen too
        if architecture == "MixtralForCausalLM":
            return cls(
                num_experts=experts,
                experts_per_token=config["num_experts_per_tok"],
                intermediate_size=config["intermediate_size"],
                block="block_sparse_moe",
                matrices=("w1", "w3", "w2"),
            )
        step = config["decoder_sparse_step"]
        dense = {n for n in range(config["num_hidden_layers"]) if (n + 1) % step} | set(config.get("mlp_only_layers") or ())
        return cls(
            num_experts=experts,
            experts_per_token=config["num_experts_per_tok"],
            intermediate_size=config["moe_intermediate_size"],
            norm_topk_prob=bool(config["norm_topk_prob"]),
            shared_intermediate_size=config["shared_expert_intermediate_size"] if architecture == "Qwen2MoeForCausalLM" else 0,
            dense_layers=tuple(sorted(dense)),
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer, normalised: nothing behind this type meets a Hugging Face quirk."""

    architecture: str  # the class name of the checkpoint, e.g. LlamaForCausalLM
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised before it is rotated
    moe: MoEConfig | None = None
    sliding_windows: tuple[int | None, ...] = ()  # per layer; query i sees key j iff i - j < window; () = none anywhere
    dtype: str = "bfloat16"  # what the checkpoint declares
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    sampling_defaults: tuple[tuple[str, int | float], ...] = ()  # what its makers recommend, by the names of SamplingParams

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ModelLoadError(f"{name} in the model's config must be a positive whole number, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ModelLoadError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """From the dictionaries of `config.json` and `generation_config.json` (whose eos list is the fuller one)."""
        names = config.get("architectures") or []
        architecture = names[0] if names else _ARCHITECTURE_OF_TYPE.get(str(config.get("model_type")), "")
        if architecture not in _HF_DEFAULTS:
            raise ModelLoadError(
                f"architecture {architecture or config.get('model_type')!r} is not supported yet; supported are {', '.join(_HF_DEFAULTS)}"
            )
        c = {**_HF_DEFAULTS[architecture], **{k: v for k, v in config.items() if v is not None}}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in c:
                raise ModelLoadError(f"config.json has no {name!r}")
        if c["hidden_act"] not in ("silu", "swish"):
            raise ModelLoadError(f"hidden_act {c['hidden_act']!r} is not supported; Llama-family models use silu")
        heads = c["num_attention_heads"]
        eos = (generation or {}).get("eos_token_id", c.get("eos_token_id"))
        return cls(
            architecture=architecture,
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=c.get("num_key_value_heads", heads),
            head_dim=c.get("head_dim", c["hidden_size"] // heads),
            max_position_embeddings=c["max_position_embeddings"],
            rms_norm_eps=float(c["rms_norm_eps"]),
            hidden_act="silu",
            rope=RopeConfig.from_hf(c),
            tie_word_embeddings=bool(c["tie_word_embeddings"]),
            qkv_bias=bool(c["qkv_bias"] if "qkv_bias" in c else c["attention_bias"]),
            attention_output_bias=bool(c["attention_output_bias"]) if "attention_output_bias" in c else bool(c["attention_bias"]),
            mlp_bias=bool(c["mlp_bias"]),
            qk_norm=architecture in _QK_NORM_ARCHITECTURES,
            moe=MoEConfig.from_hf(architecture, c),
            sliding_windows=_sliding_windows(architecture, c),
            dtype=str(c.get("dtype", c.get("torch_dtype", "bfloat16"))).removeprefix("torch."),
            eos_token_ids=tuple([eos] if isinstance(eos, int) else eos or ()),
            bos_token_id=c.get("bos_token_id"),
            sampling_defaults=_sampling_defaults(generation or {}),
        )

    def window_of(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The layer's mixture of experts; None where it has a plain feed-forward block."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    def mlp_name(self, layer: int) -> str:
        """What the checkpoint calls the layer's feed-forward block."""
        moe = self.moe_of(layer)
        return "mlp" if moe is None else moe.block

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint, in Hugging Face's spelling."""
        h, q, kv, i = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.intermediate_size
        yield "model.embed_tokens.weight", (self.vocab_size, h)
        for n in range(self.num_layers):
            layer = f"model.layers.{n}."
            yield layer + "input_layernorm.weight", (h,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield layer + f"self_attn.{name}_proj.weight", (rows, h)
                if self.qkv_bias:
                    yield layer + f"self_attn.{name}_proj.bias", (rows,)
            yield layer + "self_attn.o_proj.weight", (h, q)
            if self.attention_output_bias:
                yield layer + "self_attn.o_proj.bias", (h,)
            if self.qk_norm:
                yield layer + "self_attn.q_norm.weight", (self.head_dim,)
                yield layer + "self_attn.k_norm.weight", (self.head_dim,)
            yield layer + "post_attention_layernorm.weight", (h,)
            moe = self.moe_of(n)
            if moe is not None:
                yield from self._moe_shapes(f"{layer}{moe.block}.", moe)
                continue
            for name, shape in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i))):
                yield layer + f"mlp.{name}_proj.weight", shape
                if self.mlp_bias:
                    yield layer + f"mlp.{name}_proj.bias", shape[:1]
        yield "model.norm.weight", (h,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, h)

    def _moe_shapes(self, block: str, moe: MoEConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        h, i, shared = self.hidden_size, moe.intermediate_size, moe.shared_intermediate_size
        gate, up, down = moe.matrices
        yield block + "gate.weight", (moe.num_experts, h)
        for expert in range(moe.num_experts):
            for name, shape in ((gate, (i, h)), (up, (i, h)), (down, (h, i))):
                yield f"{block}experts.{expert}.{name}.weight", shape
        if shared:
            for name, shape in (("gate", (shared, h)), ("up", (shared, h)), ("down", (h, shared))):
                yield f"{block}shared_expert.{name}_proj.weight", shape
            yield block + "shared_expert_gate.weight", (1, h)

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied embeddings counted once."""
        return sum(math.prod(shape) for _, shape in self.tensor_shapes())

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets: all but the experts that it isn't sent to."""
        if self.moe is None:
            return self.num_parameters
        idle = self.moe.num_experts - self.moe.experts_per_token
        sparse = sum(self.moe_of(layer) is not None for layer in range(self.num_layers))
        return self.num_parameters - sparse * idle * 3 * self.hidden_size * self.moe.intermediate_size


# What transformers assumes where a config.json is silent, per architecture: the differences between the families.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_MOE_DEFAULTS: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": (), "norm_topk_prob": False}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LLAMA_DEFAULTS,
    "MistralForCausalLM": {**_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "Qwen2ForCausalLM": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "attention_bias": True,
        "attention_output_bias": False,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "Qwen3ForCausalLM": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "MixtralForCausalLM": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    "Qwen2MoeForCausalLM": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "attention_output_bias": False,
        "qkv_bias": True,
        "use_sliding_window": False,
        "max_window_layers": 28,
        **_QWEN_MOE_DEFAULTS,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen3MoeForCausalLM": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        **_QWEN_MOE_DEFAULTS,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
_MOE_ARCHITECTURES = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
_QK_NORM_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
# What generation_config.json recommends and a request may ask for by the same name. Its lengths are for scripts of one prompt.
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_ARCHITECTURE_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def _sampling_defaults(generation: Mapping[str, Any]) -> tuple[tuple[str, int | float], ...]:
    """Numbers only: a file may hold anything, and what is no number recommends nothing."""
    values = ((name, generation.get(name)) for name in _SAMPLING_NAMES)
    return tuple((name, value) for name, value in values if isinstance(value, (int, float)) and not isinstance(value, bool))


def _sliding_windows(architecture: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Per-layer windows from `sliding_window`, `use_sliding_window`, `max_window_layers` and `layer_types`."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if not window or config.get("use_sliding_window") is False or architecture == "LlamaForCausalLM":
        return ()  # Llama's config class ignores the key
    types: Sequence[str] | None = config.get("layer_types")
    if architecture == "Qwen3MoeForCausalLM":
        return tuple(window for _ in range(layers))  # its attention looks at nothing else
    if types is not None:
        return tuple(window if t == "sliding_attention" else None for t in types)
    if architecture == "Qwen2MoeForCausalLM":  # every other one of the first layers
        return tuple(window if n % 2 == 0 and n < config["max_window_layers"] else None for n in range(layers))
    first = 0
    if "use_sliding_window" in config:  # Qwen2 and 3: the first max_window_layers layers see everything
        first = config["max_window_layers"]
    return tuple(None if n < first else window for n in range(layers))
