"""SentencePiece models as a `tokenizers.Tokenizer`: from `tokenizer.model`, and from the same pieces inside a GGUF file.

One engine behind every vocabulary means one `encode`, one decoder and one streaming rule; so the pieces are converted instead of
calling the sentencepiece library, and the tests hold the ids against that library.

- BPE: SentencePiece merges the adjacent pair whose union has the best score; `tokenizers` merges by rank in a list. Listing every
  way to split every piece, best score first, gives the same order. (Kudo and Richardson 2018, arXiv:1808.06226.)
- Unigram: both take the best segmentation by the sum of the scores; of two with exactly the same sum they may take different ones.
- Text begins with a dummy `▁` where the model asks for it, and so does the text after a special token, as in the original Llama 2
  tokenizer.json and in llama.cpp. (SentencePiece itself knows no special tokens in text, so it has no opinion.)

The file is a protobuf message (sentencepiece_model.proto) of which six fields matter, so it is read here, without the protobuf
package. Left out: the WORD and CHAR kinds, and `treat_whitespace_as_suffix`; both raise a ModelLoadError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Decoder
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import Normalizer

from minfer.errors import ModelLoadError
from minfer.tokenizer.source import TokenizerSource, add_tokens

# The piece types of sentencepiece_model.proto, which GGUF's token_type shares.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` holds, as far as it decides ids. `kind` is "bpe" or "unigram"."""

    pieces: tuple[Piece, ...]
    kind: str
    unknown_id: int = 0
    bos_id: int = -1
    eos_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    byte_fallback: bool = False


def read_sentencepiece(path: Path) -> TokenizerSource:
    """Read a `tokenizer.model`. It doesn't say whether a BOS or EOS is added to a text; the caller decides (`folder.py`)."""
    try:
        model = parse_model(path.read_bytes())
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: not a SentencePiece model, or a damaged one: {error}.") from error
    backend = build_backend(model, str(path))
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unknown_id}
    texts = {name: model.pieces[token_id].text for name, token_id in ids.items() if 0 <= token_id < len(model.pieces)}
    bos = model.bos_id if "bos_token" in texts else None
    eos = (model.eos_id,) if "eos_token" in texts else ()
    return TokenizerSource(backend, bos, eos, texts, origin=str(path))


def build_backend(model: SentencePieceModel, origin: str) -> Backend:
    """The `tokenizers.Tokenizer` that gives the model's ids. Adds no BOS or EOS; the caller decides that."""
    if len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise ModelLoadError(f"{origin}: the vocabulary holds a piece twice.")
    if not 0 <= model.unknown_id < len(model.pieces):
        raise ModelLoadError(f"{origin}: the unknown token's id {model.unknown_id} is outside the vocabulary.")
    byte_pieces = {piece.text for piece in model.pieces if piece.kind == BYTE}
    byte_fallback = model.byte_fallback and len(byte_pieces) == 256
    if model.kind == "bpe":
        vocab = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
        unknown = model.pieces[model.unknown_id].text
        bpe = BPE(vocab, derive_merges(model.pieces), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
        backend = Backend(bpe)
    else:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        backend = Backend(Unigram(scored, unk_id=model.unknown_id, byte_fallback=byte_fallback))
    backend.normalizer = _normalizer(model)
    backend.decoder = _decoder(model)
    added = {
        token_id: AddedToken(piece.text, normalized=False, special=piece.kind != USER_DEFINED)
        for token_id, piece in enumerate(model.pieces)
        if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
    }
    add_tokens(backend, added, origin)
    return backend


def derive_merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best score first; ties in the order of the ids, as SentencePiece trains them.

    Control, unknown and byte pieces take no part: SentencePiece never produces them from text.
    """
    vocab = {piece.text: token_id for token_id, piece in enumerate(pieces) if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for text, token_id in vocab.items():
        for cut in range(1, len(text)):
            left, right = vocab.get(text[:cut]), vocab.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-pieces[token_id].score, token_id, left, right, text[:cut], text[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(model: SentencePieceModel) -> Normalizer:
    steps: list[Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> Decoder:
    steps: list[Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def parse_model(data: bytes) -> SentencePieceModel:
    """Parse the protobuf message `ModelProto`. Raises ValueError (or IndexError) for bytes that aren't one."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))[0]
            pieces.append(Piece(_bytes(fields.get(1, b"")).decode(), score, _int(fields.get(3, NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    kind = {1: "unigram", 2: "bpe"}.get(_int(trainer.get(3, 1)))
    if kind is None or _int(trainer.get(24, 0)):
        raise ValueError("its kind is neither BPE nor Unigram with spaces in front, and only those are supported")
    if not pieces or not trainer or not normalizer:
        raise ValueError("it ends before its pieces or its settings")
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=kind,
        unknown_id=_int(trainer.get(40, 0)),
        bos_id=_int(trainer.get(41, 1)),
        eos_id=_int(trainer.get(42, 2)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(_int(normalizer.get(3, 1))),
        remove_extra_whitespaces=bool(_int(normalizer.get(4, 1))),
        byte_fallback=bool(_int(trainer.get(35, 0))),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: (number, integer for varints, bytes for everything else)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"protobuf wire type {wire} at byte {position}")
        if position + length > len(data):
            raise ValueError("the file ends in the middle of a field")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A little-endian base-128 number; values are 64-bit two's complement, which is how protobuf writes -1."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return (value - (1 << 64) if value >> 63 else value), position
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {position}")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where text was expected")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text stands where a number was expected")
    return value
