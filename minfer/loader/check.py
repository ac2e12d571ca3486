"""Two looks at a checkpoint: its headers against what its config promises, before any weight is read, and its numbers as they come by.

A model that loads with a tensor missing or ignored still answers, only wrongly; so everything that doesn't match is an
error that names the tensor, the file and what was expected. Tolerated are only leftovers known to carry no information.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from minfer.errors import ModelLoadError
from minfer.loader.checkpoint import TensorInfo
from minfer.model_config import ModelConfig
from minfer.quant import PackedWeight

Named = tuple[str, torch.Tensor | PackedWeight]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROUTER = re.compile(r".*\.(gate|shared_expert_gate)\.weight")


def is_router(name: str) -> bool:
    """Whether the tensor is one that decides which experts a token goes through: few weights, and rounding them changes the decision."""
    return _ROUTER.fullmatch(name) is not None


def check_tensors(config: ModelConfig, found: Mapping[str, TensorInfo], where: Path) -> dict[str, TensorInfo]:
    """The tensors to load, in the order of `found`; raises `ModelLoadError` on the first thing that doesn't match.

    A tied model's own `lm_head.weight` is left out; whether a head that is present makes the model untied is the reader's call,
    made before this check, because it takes a look at the data.
    """
    wanted = {}
    for name, shape in config.tensor_shapes():
        info = found.get(name)
        if info is None:  # before looking further: a config that lies about its layers must not make us list millions of names
            raise ModelLoadError(
                f"{where}: tensor {name!r} {list(shape)} is missing; the download is incomplete or the config is another model's"
            )
        if info.shape != shape:
            raise ModelLoadError(
                f"{info.file or where}: tensor {name!r} has shape {list(info.shape)}, but the model's config asks for {list(shape)}"
            )
        wanted[name] = info
    for name, info in found.items():
        if name not in wanted and not _carries_nothing(name, config):
            raise ModelLoadError(
                f"{info.file or where}: tensor {name!r} {list(info.shape)} has no place in {config.architecture} with this config; "
                "the file belongs to another model or to a variant that is not supported"
            )
    return {name: wanted[name] for name in found if name in wanted}


def _carries_nothing(name: str, config: ModelConfig) -> bool:
    """Buffers that old transformers releases saved (the frequencies follow from the config), and the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)


def finite(tensors: Iterable[Named], infos: Mapping[str, TensorInfo]) -> Iterator[Named]:
    """The same tensors; raises `ModelLoadError` at the first that holds a NaN or an infinity, or a quantised one that is all zero.

    One such number makes every token after it noise, with nothing to show where it came from. Looking for the smallest and
    largest value costs about a tenth of the time that repacking does.
    """
    for name, tensor in tensors:
        parts = [tensor] if isinstance(tensor, torch.Tensor) else [part for part in (tensor.scales, tensor.mins) if part is not None]
        where = infos[name].file if name in infos else None
        prefix = f"{where}: " if where is not None else ""
        if not all(bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()) for part in parts if part.numel()):
            raise ModelLoadError(f"{prefix}tensor {name!r} holds numbers that are not finite; the file is damaged")
        if isinstance(tensor, PackedWeight) and not any(bool(part.any()) for part in parts):
            raise ModelLoadError(f"{prefix}tensor {name!r} has only scales of zero; the file is damaged")
        yield name, tensor
