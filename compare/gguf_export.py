"""HF folder -> GGUF, with the format owner's writer: the common first step of the engines of llama.cpp's family.

Runs inside those engines' environments (needs gguf and numpy). q and k are reordered as GGUF's llama convention wants. Types
the `gguf` package can write: F16, BF16, Q8_0, Q4_0, Q4_1; norms stay F32, and so that a 4-bit file compares with what
`llama-quantize` makes, the embedding of a 4-bit file is Q8_0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANDOM = "random"  # a file of this name in a weights folder says that its values mean nothing
DUMMY_TOKEN_TYPE = 1  # "normal" in GGUF's table of token kinds


def write_or_share_gguf(weights: Path, out: Path, element: str) -> None:
    """`write_gguf`, but random weights are written once, beside their source, and every engine that reads GGUF gets that file.

    So the large shapes cost one quantised file, and the engines run the same bits.
    """
    if not (weights / RANDOM).exists():
        write_gguf(weights, out, element)
        return
    shared = weights / f"{element}.gguf"
    if not shared.exists():
        partial = shared.with_suffix(".partial")
        write_gguf(weights, partial, element)
        partial.rename(shared)
    out.symlink_to(shared.resolve())


def write_gguf(weights: Path, out: Path, element: str, *, vocabulary: bool = False) -> None:
    """Writes `out`. `vocabulary`: put the tokenizer in too (servers insist on one), else the file says `no_vocab`."""
    import gguf
    from gguf.quants import quantize

    config = json.loads((weights / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    _write_shape(writer, config)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, f"MOSTLY_{element}")))
    if vocabulary:
        _write_vocabulary(writer, weights, config["vocab_size"])
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, values in read_bf16(weights):
        target = gguf_name(name)
        if values.ndim == 1:
            writer.add_tensor(target, values)
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            rows, columns = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        small = element.startswith("Q4") and ("embed" in name or "lm_head" in name)
        kind = gguf.GGMLQuantizationType["Q8_0" if small else element]
        writer.add_tensor(target, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bf16(weights: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of a bf16 safetensors folder as float32, one in memory at a time."""
    import numpy as np

    for file in sorted(weights.glob("*.safetensors")):
        data = np.memmap(file, dtype=np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file.name}: tensor {name} is {entry['dtype']}; comparisons start from bf16 weights")
            begin, end = (8 + length + o for o in entry["data_offsets"])
            bits = data[begin:end].view(np.uint16).astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in top:
        return top[name]
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    _, _, layer, rest = name.split(".", 3)
    part, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{parts[part]}.{suffix}"


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _write_vocabulary(writer: Any, weights: Path, size: int) -> None:
    """The shipped file's own tokenizer where there is one; otherwise as many made-up words as the vocabulary has ids."""
    import gguf

    shipped = weights / "source.gguf"
    if not shipped.exists():
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))])
        writer.add_token_scores([0.0] * size)
        writer.add_token_types([DUMMY_TOKEN_TYPE] * size)
        return
    fields = gguf.GGUFReader(shipped).fields
    meta = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.ggml.")}
    writer.add_tokenizer_model(meta["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(meta["tokenizer.ggml.pre"])
    writer.add_token_list(meta["tokenizer.ggml.tokens"])
    writer.add_token_types(meta["tokenizer.ggml.token_type"])
    writer.add_token_merges(meta["tokenizer.ggml.merges"])
    writer.add_bos_token_id(meta["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(meta["tokenizer.ggml.eos_token_id"])
