"""How a byte-level GGUF vocabulary cuts text before merging: `tokenizer.ggml.pre` names it, this table spells it out.

GGUF doesn't store the splitting rules of the original `tokenizer.json`, only a name for them (llama.cpp, `src/llama-vocab.cpp`).
A wrong rule gives ids that look right and a model that is quietly worse, so a name that isn't in the table is an error.

Where the two differ, the original tokenizer's rule counts, not llama.cpp's copy of it: Qwen2's normalises to NFC, for
instance, and llama.cpp doesn't. Left out: names whose original rules could not be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from minfer.errors import ModelLoadError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
DEEPSEEK3 = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"


@dataclass(frozen=True)
class PreTokenization:
    """Patterns applied one after the other, each isolating its matches in the pieces that the one before left.

    `ignore_merges`: a piece that is itself a token is taken whole. `add_bos`: what applies where the file doesn't say. `nfc`: the
    text is normalised to NFC first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def normalizer(self) -> Normalizer | None:
        """The normalizer for `tokenizers`, or None."""
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> PreTokenizer:
        """The pre-tokenizer for `tokenizers`: the splits, then text to GPT-2's byte alphabet."""
        splits: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = PreTokenization((GPT2,))
_DIGITS = PreTokenization((r"\p{N}", GPT2))
_LLAMA3 = PreTokenization((LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenization((QWEN2,), nfc=True)
_GPT4O = PreTokenization((GPT4O,))

PRE_TOKENIZATIONS: dict[str, PreTokenization] = {
    "default": PreTokenization((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": PreTokenization((LLAMA3,)),
    "dbrx": PreTokenization((LLAMA3,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": PreTokenization((QWEN2,)),
    "qwen35": PreTokenization((QWEN35,), nfc=True),
    "tekken": PreTokenization((TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "falcon": PreTokenization((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenization((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": PreTokenization((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)),
}


def pre_tokenization(name: str) -> PreTokenization:
    """The rules that `tokenizer.ggml.pre` names. Raises ModelLoadError for a name that isn't in the table."""
    try:
        return PRE_TOKENIZATIONS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZATIONS))
        reason = f"This GGUF file's pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; minfer knows: {known}."
        raise ModelLoadError(reason) from None
