"""Reads the checkpoints of drafting heads: which kind it is, its shape, and its tensors under one spelling.

    kind        known by                                               as published by
    eagle       one Llama layer and an fc of 2 hidden sizes            EAGLE-1 and 2 (SafeAILab), `speculators` "eagle"
    eagle3      draft_vocab_size, or an fc of 3                        EAGLE-3 (SafeAILab, SpecForge), `speculators` "eagle3"
    medusa      medusa_num_heads, or model_type "medusa"               FasterDecoding, vLLM's rewriting of it
    redrafter   model_type "recurrent_drafting_drafter"                Apple

Names are brought into these forms: EAGLE's `fc`, `midlayer.*`, `norm`, `lm_head`, `embed_tokens`, `d2t`; Medusa's
`blocks.{head}.layers.{n}`, `lm_heads.{head}`; ReDrafter's own. `token_ids` is the vocabulary that a head guesses from, by whatever
name it came (`d2t` holds differences: id = i + d2t[i]; `token_map` the ids themselves); None for all of the target's.

Pickled weights are refused, as everywhere. Left out: other `speculators` kinds (peagle, dflash, mtp, mlp), which raise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from minfer.errors import ModelLoadError
from minfer.loader.hf_config import build_config, read_json
from minfer.model_config import ModelConfig

HeadKind = Literal["eagle", "eagle3", "medusa", "redrafter"]
PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """`layer` is the shape of an EAGLE head's decoder layer; for the others its hidden and vocabulary sizes alone mean something.

    `vocab_size` is the number of ids that the head guesses from. `after` names the target's states that it reads, as numbers of
    layers, where the checkpoint says so.
    """

    kind: HeadKind
    layer: ModelConfig
    vocab_size: int
    target_hidden_size: int
    after: tuple[int, ...] = ()
    norm_before_residual: bool = False
    norm_inputs: bool = False  # EAGLE with a norm on embedding and on state (HASS, `speculators`)
    fc_bias: bool = False
    num_heads: int = 0  # Medusa
    num_blocks: int = 0  # residual blocks of a Medusa or ReDrafter head
    block_bias: bool = True
    exit_size: int = 0  # ReDrafter: width of its output layers
    recurrent: bool = True  # ReDrafter: a cell, or a plain sum of embeddings


@dataclass(frozen=True)
class HeadCheckpoint:
    config: HeadConfig
    tensors: Mapping[str, torch.Tensor]
    token_ids: torch.Tensor | None  # [vocab_size] int64, the target's ids


def is_head(folder: Path) -> bool:
    """Whether a folder holds a drafting head rather than a whole model."""
    config = folder / "config.json"
    return config.is_file() and _kind(read_json(config), _names(folder)) is not None


def read_head(folder: Path) -> HeadCheckpoint:
    """Raises ModelLoadError with the file and what is wrong with it."""
    raw = read_json(folder / "config.json")
    tensors = _read(folder)
    kind = _kind(raw, tensors.keys())
    if kind is None:
        raise ModelLoadError(f"{folder} is no drafting head: its config names none of the kinds eagle, eagle3, medusa, redrafter")
    try:
        if kind == "medusa":
            head = _medusa(raw, tensors)
        elif kind == "redrafter":
            head = _redrafter(raw, tensors)
        else:
            head = _eagle(kind, raw, tensors, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'config.json'}: a value of the {kind} head is missing or of the wrong kind ({error})") from error
    ids = head.token_ids
    if ids is not None and (
        len(ids) != head.config.vocab_size or bool((ids < 0).any()) or bool((ids >= head.config.layer.vocab_size).any())
    ):
        sizes = f"{head.config.vocab_size} of {head.config.layer.vocab_size}"
        raise ModelLoadError(f"{folder}: the head's map of {len(ids)} ids doesn't fit a vocabulary of {sizes}")
    return head


def _kind(raw: Mapping[str, Any], tensors: Collection[str]) -> HeadKind | None:
    named = raw.get("speculators_model_type")
    if named is not None:
        if named not in ("eagle", "eagle3"):
            raise ModelLoadError(f"speculators_model_type {named!r} is not supported; supported are eagle and eagle3")
        return "eagle3" if named == "eagle3" else "eagle"
    architecture = str((raw.get("architectures") or [""])[0])
    if raw.get("model_type") == "medusa" or "medusa_num_heads" in raw:
        return "medusa"
    if raw.get("model_type") == "recurrent_drafting_drafter":
        return "redrafter"
    if raw.get("draft_vocab_size") is not None or "Eagle3" in architecture:
        return "eagle3"
    if "Eagle" in architecture or raw.get("model_type") == "eagle":
        return "eagle"
    # EAGLE-1 calls itself a Llama of one layer: only its tensors tell.
    if raw.get("num_hidden_layers") == 1 and "fc.weight" in tensors:
        return "eagle"
    return None


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as f:
                names |= set(f.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError):
            return set()  # whoever reads it in earnest says what is wrong
    return names


def _read(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
        found = f"only pickled weights ({pickled[0]}), which minfer never loads; convert them to safetensors" if pickled else "no weights"
        raise ModelLoadError(f"{folder} has {found}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelLoadError(f"{file} is not a sound safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype in PLAIN and not bool(tensor.isfinite().all()):
            raise ModelLoadError(f"{folder}: tensor {name!r} holds numbers that are not finite; the file is damaged")
    return tensors


def _layer_config(raw: Mapping[str, Any], folder: Path) -> ModelConfig:
    layer = {**raw, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    layer["attention_bias"] = bool(raw.get("attention_bias", False) or raw.get("qkv_bias", False))
    return build_config(layer, folder / "config.json")


def _eagle(kind: HeadKind, raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> HeadCheckpoint:
    speculators = "speculators_model_type" in raw
    shape = raw["transformer_layer_config"] if speculators else raw
    layer = _layer_config(shape, folder)
    renamed = {_eagle_name(name): tensor for name, tensor in tensors.items()}
    ids = None
    if "d2t" in renamed:
        ids = renamed["d2t"].long() + torch.arange(len(renamed["d2t"]))
    of_the_target = ("rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight")
    dropped = {"d2t", "t2d"} | {name for name in renamed if name.endswith(of_the_target)}
    vocab = raw.get("draft_vocab_size") or layer.vocab_size
    eagle_config = raw.get("eagle_config") or {}
    after = raw.get("eagle_aux_hidden_state_layer_ids") or eagle_config.get("eagle_aux_hidden_state_layer_ids") or ()
    config = HeadConfig(
        kind=kind,
        layer=layer,
        vocab_size=int(vocab),
        target_hidden_size=int(raw.get("target_hidden_size") or layer.hidden_size),
        after=tuple(int(n) for n in after),
        norm_before_residual=bool(raw.get("norm_before_residual", speculators)),
        norm_inputs="embedding_layernorm.weight" in renamed,
        fc_bias="fc.bias" in renamed,
    )
    return HeadCheckpoint(config, {name: tensor for name, tensor in renamed.items() if name not in dropped}, ids)


def _eagle_name(name: str) -> str:
    """One spelling: the decoder layer is `midlayer`, whoever wrote it."""
    name = name.removeprefix("model.").removeprefix("draft_model.")
    name = re.sub(r"^(layers\.0|transformer)\.", "midlayer.", name)
    swapped = {"fusion_fc": "fc", "pre_lm_head_layernorm": "hidden_states_layernorm"}
    stem, _, part = name.rpartition(".")
    return f"{swapped[stem]}.{part}" if stem in swapped else name


def _medusa(raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> HeadCheckpoint:
    heads = int(raw.get("medusa_num_heads") or raw["num_heads"])
    blocks = int(raw.get("medusa_num_layers") or raw.get("num_hidden_layers") or 1)
    renamed = {_medusa_name(name.removeprefix("medusa_heads.").removeprefix("medusa_head."), blocks): t for name, t in tensors.items()}
    ids = renamed.pop("token_map").long() if "token_map" in renamed else None
    if raw.get("original_lm_head") and "lm_heads.0.weight" not in renamed and "lm_head.weight" in renamed:
        renamed["lm_heads.0.weight"] = renamed.pop("lm_head.weight")
    for head in range(1, heads):  # one head for all
        if raw.get("original_lm_head"):
            renamed.setdefault(f"lm_heads.{head}.weight", renamed["lm_heads.0.weight"])
    kept = {name: tensor for name, tensor in renamed.items() if _number(name) < heads}
    if ids is not None:
        kept = {n: t[ids] if n.startswith("lm_heads") and len(t) > len(ids) else t for n, t in kept.items()}
    rows, hidden = kept["lm_heads.0.weight"].shape
    vocab = int(raw.get("vocab_size") or rows)
    layer = _sizes(hidden, vocab)
    bias = "blocks.0.layers.0.bias" in kept
    config = HeadConfig(
        kind="medusa", layer=layer, vocab_size=rows, target_hidden_size=hidden, num_heads=heads, num_blocks=blocks, block_bias=bias
    )
    return HeadCheckpoint(config, kept, ids)


def _medusa_name(name: str, blocks: int) -> str:
    """`{head}.{n}.linear.weight` are its blocks and `{head}.{blocks}.weight` its vocabulary, in FasterDecoding's files."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(?:linear\.)?(weight|bias)", name)
    if match is None:
        return name
    head, number, part = match.groups()
    return f"lm_heads.{head}.{part}" if int(number) == blocks else f"blocks.{head}.layers.{number}.{part}"


def _number(name: str) -> int:
    match = re.match(r"(?:blocks|lm_heads)\.(\d+)\.", name)
    return int(match[1]) if match else 0


def _redrafter(raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> HeadCheckpoint:
    renamed = {name.removeprefix("drafter."): tensor for name, tensor in tensors.items()}
    ids = None
    if "d2t" in renamed:
        ids = renamed.pop("d2t")
        ids = ids.long() + torch.arange(len(ids))
    hidden, blocks = int(raw["hidden_size"]), int(raw["num_draft_layers"])
    head = renamed.pop(f"lm_head.{blocks}.weight")
    renamed["output.weight"] = head
    vocab = len(head) if ids is None else max(int(ids.max()) + 1, len(head))
    config = HeadConfig(
        kind="redrafter",
        layer=_sizes(hidden, vocab),
        vocab_size=len(head),
        target_hidden_size=hidden,
        num_blocks=blocks,
        exit_size=int(raw["exit_dim"]),
        recurrent=bool(raw.get("rnn", False)),
    )
    return HeadCheckpoint(config, renamed, ids)


def _sizes(hidden: int, vocab: int) -> ModelConfig:
    """A ModelConfig that says no more than two sizes: these heads have no decoder layer."""
    return ModelConfig(
        architecture="", vocab_size=vocab, hidden_size=hidden, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=2, max_position_embeddings=1,
    )  # fmt: skip
