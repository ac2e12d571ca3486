"""The tokenizer inside a GGUF file, rebuilt as a `tokenizers.Tokenizer`.

GGUF stores the vocabulary as plain arrays under `tokenizer.ggml.*` (the GGUF specification, and llama.cpp's
`src/llama-vocab.cpp` for the defaults of what a file leaves out). Two kinds matter for generation:

- `gpt2`: byte-level BPE with a list of merges, split as `tokenizer.ggml.pre` names (`pretokenizers.py`);
- `llama`: SentencePiece, pieces with scores (`spm.py`).

The other kinds (bert, t5, rwkv, plamo2, gemma4, ...) raise a ModelLoadError.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from minfer.errors import ModelLoadError
from minfer.tokenizer.pretokenizers import pre_tokenization
from minfer.tokenizer.source import TokenizerSource, add_tokens, set_bos_eos
from minfer.tokenizer.spm import CONTROL, UNKNOWN, USER_DEFINED, Piece, SentencePieceModel, build_backend

ORIGIN = "GGUF metadata"
_KEY = "tokenizer.ggml."
_LOG = logging.getLogger(__name__)

# Control tokens that end a reply. Many files name only one of them in eos_token_id (Llama 3's first files named <|end_of_text|>
# where the chat model says <|eot_id|>), and a model that can't stop is worse than one that knows one more way to.
END_OF_TURN = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<EOT>", "</s>"}
    | {"<｜end▁of▁sentence｜>"}
)


def read_gguf_metadata(metadata: Mapping[str, Any]) -> TokenizerSource:
    """Build the tokenizer from GGUF's key-value metadata. Raises ModelLoadError naming the key that is missing or wrong."""
    kind = metadata.get(_KEY + "model")
    tokens = _array(metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise ModelLoadError(f"{ORIGIN}: tokenizer.ggml.tokens holds a token twice.")
    types = _array(metadata, "token_type", int, len(tokens)) if _KEY + "token_type" in metadata else [1] * len(tokens)
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens, types)
        default_bos: int | None = None
        default_eos: int | None = None
    elif kind == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens, types), True
        default_bos, default_eos = 1, 2
    else:
        raise ModelLoadError(f"{ORIGIN}: a tokenizer of kind {kind!r} (tokenizer.ggml.model) is not supported; gpt2 and llama are.")
    bos, eos = _token_id(metadata, "bos", len(tokens), default_bos), _token_id(metadata, "eos", len(tokens), default_eos)
    _set_bos_eos(backend, metadata, tokens, bos if metadata.get(_KEY + "add_bos_token", add_bos) else None, eos)
    named = {"bos_token": bos, "eos_token": eos, **{f"{short}_token": _token_id(metadata, key, len(tokens)) for short, key in _NAMED}}
    return TokenizerSource(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=_end_ids(metadata, tokens, types, eos),
        special_texts={name: tokens[token_id] for name, token_id in named.items() if token_id is not None},
        chat_templates=_chat_templates(metadata),
        origin=ORIGIN,
    )


_NAMED = (("unk", "unknown"), ("pad", "padding"), ("sep", "seperator"), ("cls", "cls"), ("mask", "mask"))


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> tuple[Backend, bool]:
    pre = metadata.get(_KEY + "pre")
    if pre is None:
        _LOG.warning("This GGUF file doesn't name its pre-tokenizer (tokenizer.ggml.pre); using llama.cpp's default, which may be wrong.")
    rules = pre_tokenization("default" if pre is None else str(pre))
    merges = []
    for line in _array(metadata, "merges", str):
        cut = line.find(" ", 1)
        if cut < 0 or cut == len(line) - 1:
            raise ModelLoadError(f"{ORIGIN}: tokenizer.ggml.merges holds {line!r}, which is not a pair of tokens.")
        merges.append((line[:cut], line[cut + 1 :]))
    vocab = {token or f"[EMPTY_{token_id}]": token_id for token_id, token in enumerate(tokens)}
    try:
        backend = Backend(BPE(vocab, merges, ignore_merges=rules.ignore_merges))
    except Exception as error:  # `tokenizers` raises plain Exception for a merge of tokens that don't exist
        raise ModelLoadError(f"{ORIGIN}: tokenizer.ggml.merges doesn't fit the tokens: {error}.") from error
    normalizer = rules.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = rules.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    added = {
        token_id: AddedToken(tokens[token_id], normalized=False, special=kind != USER_DEFINED)
        for token_id, kind in enumerate(types)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and tokens[token_id]
    }
    add_tokens(backend, added, ORIGIN)
    return backend, rules.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Backend:
    scores = _array(metadata, "scores", (int, float), len(tokens))
    unknown = next((token_id for token_id, kind in enumerate(types) if kind == UNKNOWN), 0)
    model = SentencePieceModel(
        pieces=tuple(Piece(token, float(score), kind) for token, score, kind in zip(tokens, scores, types, strict=True)),
        kind="bpe",
        unknown_id=_token_id(metadata, "unknown", len(tokens), unknown) or 0,
        add_dummy_prefix=bool(metadata.get(_KEY + "add_space_prefix", True)),
        remove_extra_whitespaces=bool(metadata.get(_KEY + "remove_extra_whitespaces", False)),
        byte_fallback=True,
    )
    return build_backend(model, ORIGIN)


def _array(metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...], length: int | None = None) -> Sequence[Any]:
    values = metadata.get(_KEY + name)
    if values is None:
        raise ModelLoadError(f"{ORIGIN}: {_KEY}{name} is missing, so the file's tokenizer can't be rebuilt.")
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, kind) for value in values):
        raise ModelLoadError(f"{ORIGIN}: {_KEY}{name} is not an array of the expected type.")
    if length is not None and len(values) != length:
        raise ModelLoadError(f"{ORIGIN}: {_KEY}{name} has {len(values)} entries, but there are {length} tokens.")
    return values


def _token_id(metadata: Mapping[str, Any], name: str, count: int, default: int | None = None) -> int | None:
    """The id under `tokenizer.ggml.NAME_token_id`, None where the file has none."""
    value = metadata.get(f"{_KEY}{name}_token_id", default)
    if value is None or (value == default and value >= count):
        return None
    if not 0 <= int(value) < count:
        raise ModelLoadError(f"{ORIGIN}: {_KEY}{name}_token_id is {value}, but there are only {count} tokens.")
    return int(value)


def _set_bos_eos(backend: Backend, metadata: Mapping[str, Any], tokens: Sequence[str], bos: int | None, eos: int | None) -> None:
    if metadata.get(_KEY + "add_bos_token") and bos is None:
        raise ModelLoadError(f"{ORIGIN}: add_bos_token is set, but there is no bos_token_id.")
    add_eos = bool(metadata.get(_KEY + "add_eos_token", False))
    if add_eos and eos is None:
        raise ModelLoadError(f"{ORIGIN}: add_eos_token is set, but there is no eos_token_id.")
    first = None if bos is None else (tokens[bos], bos)
    set_bos_eos(backend, first, (tokens[eos], eos) if add_eos and eos is not None else None)


def _end_ids(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], eos: int | None) -> tuple[int, ...]:
    named = [eos, _token_id(metadata, "eot", len(tokens)), _token_id(metadata, "eom", len(tokens))]
    texts = {tokens[token_id]: token_id for token_id, kind in enumerate(types) if kind == CONTROL and tokens[token_id] in END_OF_TURN}
    if "<|return|>" in tokens and "<|call|>" in tokens:  # harmony: <|end|> ends a message there, not the reply
        texts.pop("<|end|>", None)
    return tuple(dict.fromkeys([token_id for token_id in named if token_id is not None] + sorted(texts.values())))


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {key[len(prefix) + 1 :]: str(value) for key, value in metadata.items() if key.startswith(prefix + ".")}
    return named | ({"default": str(metadata[prefix])} if prefix in metadata else {})
