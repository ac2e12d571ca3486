"""What a checkpoint says about its tokenizer, whichever file it stood in: the one form that the readers produce.

`folder.py`, `gguf_vocab.py` and `spm.py` each fill in a `TokenizerSource`; `Tokenizer` is built from it and knows no file formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from minfer.errors import ModelLoadError


@dataclass(frozen=True)
class TokenizerSource:
    """A `tokenizers.Tokenizer` and the facts beside it.

    `special_texts` are the variables that chat templates read (`bos_token`, `eos_token`, ...); `chat_templates` maps a name
    ("default", "tool_use") to a jinja2 template; `origin` names the file in errors.
    """

    backend: Backend
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_texts: Mapping[str, str]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    origin: str = "tokenizer"


def set_bos_eos(backend: Backend, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """Make `encode(add_special_tokens=True)` put `bos` before and `eos` after the text; None for neither. Each is (text, id)."""
    specials = [token for token in (bos, eos) if token is not None]
    template = ([bos[0]] if bos else []) + ["$A"] + ([eos[0]] if eos else [])
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)


def add_tokens(backend: Backend, tokens: Mapping[int, AddedToken], origin: str) -> None:
    """Make these ids added tokens, matched whole in text. Raises ModelLoadError where a token would get another id."""
    ordered = [tokens[token_id] for token_id in sorted(tokens)]
    backend.add_tokens(ordered)
    for token_id, token in tokens.items():
        actual = backend.token_to_id(token.content)
        if actual != token_id:
            reason = f"{origin}: token {token.content!r} should have id {token_id}, but the vocabulary gives it {actual}."
            raise ModelLoadError(reason)
