"""What GGUF's metadata keys and tensor names mean in Hugging Face's words.

The result is a `config.json`-style dictionary, so that `ModelConfig.from_hf` stays the only place that knows the defaults. A GGUF
header says less than a config.json: whether the head is tied and where biases are follows from which tensors exist, and Llama 3's
frequency scaling comes as a tensor of divisors (`rope_freqs.weight`), given here as `rope_freq_factors`.

A mixture of experts has each kind of its matrices as one tensor [E, N, K]; the name given for it has a place, {}, for the expert's number.

Left out: partial rotary embeddings and per-layer head counts, which are refused by name, and files from before 2024-04 with a tensor for
each expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from minfer.errors import ModelLoadError

# llama.cpp's converter files Mistral and Mixtral under "llama" too, which differ in the sliding window and in having experts.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MIXTRAL_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
QWEN_MOE_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


def hf_name(name: str, arch: str) -> str | None:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`; None for a name that these architectures don't have."""
    match = LAYER_TENSOR.fullmatch(name)
    names = {**LAYER_NAMES, **(MIXTRAL_NAMES if arch == "llama" else QWEN_MOE_NAMES if arch.endswith("moe") else {})}
    if match and match[2] in names:
        return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{TOP_NAMES[stem]}.{kind}" if stem in TOP_NAMES else None


def hf_config(metadata: Mapping[str, Any], tensor_names: Collection[str], embedding_rows: int) -> dict[str, Any]:
    """The dictionary for `ModelConfig.from_hf`. `embedding_rows` stands in for the vocabulary of a file without a tokenizer."""
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelLoadError(f"GGUF architecture {arch!r} is not supported yet; supported are {', '.join(ARCHITECTURES)}")
    keys = _Keys(metadata, arch)
    experts = _experts(keys, arch)
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, head_dim) != head_dim:
            raise ModelLoadError(f"{arch}.{name} is {keys.integer(name)}, but only the head size, {head_dim}, is supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    window = keys.integer("attention.sliding_window", 0)
    layer_kinds = {match[2] + "." + match[3] for match in map(LAYER_TENSOR.fullmatch, tensor_names) if match}
    family = ARCHITECTURES[arch]
    if arch == "llama":
        family = "MixtralForCausalLM" if experts else "MistralForCausalLM" if window else family
    return {
        "architectures": [family],
        **experts,
        "vocab_size": len(tokens) if isinstance(tokens, list) else embedding_rows,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", experts.get("moe_intermediate_size")),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        "hidden_act": "silu",
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
        "max_window_layers": 0,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "attn_q.bias" in layer_kinds,
        "attention_output_bias": "attn_output.bias" in layer_kinds,
        "mlp_bias": "ffn_gate.bias" in layer_kinds,
        "bos_token_id": next(iter(_token_ids(metadata, "bos")), None),
        # Of a sequence, and of a turn or a message where the file tells them apart (Llama 3).
        "eos_token_id": _token_ids(metadata, "eos", "eot", "eom"),
    }


def _experts(keys: _Keys, arch: str) -> dict[str, Any]:
    """What says how many experts there are and how they are chosen, which llama.cpp knows by the architecture; empty without any."""
    if not arch.endswith("moe") and not keys.integer("expert_count", 0):
        return {}
    values: dict[str, Any] = {"num_local_experts": keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}
    if arch.endswith("moe"):
        values |= {"moe_intermediate_size": keys.integer("expert_feed_forward_length"), "norm_topk_prob": arch == "qwen3moe"}
    if arch == "qwen2moe":
        values["shared_expert_intermediate_size"] = keys.integer("expert_shared_feed_forward_length")
    return values


def _token_ids(metadata: Mapping[str, Any], *names: str) -> list[int]:
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    return list(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type", "none")
    legacy = keys.number("rope.scale_linear", 0.0)  # before there were types
    if kind == "none":
        return {"rope_type": "linear", "factor": legacy} if legacy not in (0.0, 1.0) else None
    factor = keys.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ModelLoadError(f"rope scaling {kind!r} of a GGUF file is not supported; supported are none, linear, yarn")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", 0) or None,
    }
    for name, key in (("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")):
        scaling[name] = keys.number(key, 0.0) or None
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise ModelLoadError("rope.scaling.yarn_ext_factor other than 1 is not supported")
    multiplier = keys.number("rope.scaling.yarn_attn_factor", keys.number("rope.scaling.attn_factor", 1.0))
    if multiplier != 1.0 and factor > 0:  # llama.cpp multiplies YaRN's own temperature by it; a config.json states the product
        scaling["attention_factor"] = multiplier * (0.1 * math.log(factor) + 1.0)
    return scaling


class _Keys:
    """Typed access to the keys below `general.architecture`'s name."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.metadata, self.arch = metadata, arch

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):  # one per layer, all alike
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelLoadError(f"metadata key {self.arch}.{name} is {str(value)[:60]}, expected one whole number")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelLoadError(f"metadata key {self.arch}.{name} is {str(value)[:60]}, expected a number")
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ModelLoadError(f"metadata key {self.arch}.{name} is {str(value)[:60]}, expected a string")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise ModelLoadError(f"metadata key {self.arch}.{name} is missing")
        return value
