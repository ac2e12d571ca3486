"""Text to ids and back, for every checkpoint format, behind one class.

The work of encoding is done by the `tokenizers` library, whatever file the vocabulary came from (`folder.py`, `gguf_vocab.py`, `spm.py`),
so ids are those of the Hugging Face tokenizer. Decoding is a per-token map to bytes (`token_bytes.py`), so that streamed and whole
text are the same by construction.

**BOS, once.** `encode` adds the tokens that the checkpoint adds (a BOS for Llama), as a plain prompt needs. A chat template
writes its own BOS where the model wants one, so `apply_chat_template` never adds another. Who renders a chat
with `render_chat` and encodes it himself must pass `add_special_tokens=False`.

Left out: padding, truncation, text pairs and `clean_up_tokenization_spaces`, which would make streamed text differ from whole text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minfer.errors import RequestError
from minfer.tokenizer import chat
from minfer.tokenizer.detokenizer import IncrementalDetokenizer
from minfer.tokenizer.folder import read_folder
from minfer.tokenizer.gguf_vocab import read_gguf_metadata
from minfer.tokenizer.source import TokenizerSource
from minfer.tokenizer.text_only import TextOnlyEncoder
from minfer.tokenizer.token_bytes import TokenBytes


class Tokenizer:
    """A checkpoint's tokenizer. Immutable in use and safe to share between threads."""

    def __init__(self, source: TokenizerSource) -> None:
        self._source = source
        self._backend = source.backend
        self._token_bytes = TokenBytes.from_backend(source.backend, source.origin)
        added = source.backend.get_added_tokens_decoder()
        self._specials = {id_: token.content for id_, token in added.items() if token.special}
        self._special_by_normalised_text = any(token.special and token.normalized for token in added.values())
        self._vocab_size = max([source.backend.get_vocab_size(with_added_tokens=True), *(id_ + 1 for id_ in added)])
        self._text_only: TextOnlyEncoder | None = None
        self._lock = threading.Lock()
        self._templates = chat.TemplateRunner()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a folder in Hugging Face layout. Raises ModelLoadError with the file and the reason."""
        return cls(read_folder(Path(path)))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer from a GGUF file's key-value metadata. Raises ModelLoadError with the key and the reason."""
        return cls(read_gguf_metadata(metadata))

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included. The model's own vocabulary may be padded beyond it."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, where the checkpoint names one."""
        return self._source.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a reply."""
        return self._source.eos_token_ids

    @property
    def special_texts(self) -> Mapping[str, str]:
        """The special tokens that the checkpoint names, as text: `bos_token`, `eos_token`, `pad_token` and so on."""
        return self._source.special_texts

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's default chat template, a jinja2 source; None for a model without one."""
        return self._source.chat_templates.get("default")

    @property
    def tool_template(self) -> str | None:
        """The chat template that is used when a request brings tools; None if there is none, or it doesn't read them."""
        templates = self._source.chat_templates
        template = templates.get("tool_use", templates.get("default"))
        return template if template is not None and re.search(r"\btools\b", template) else None

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of `text`.

        `add_special_tokens` adds what the checkpoint puts around a text (a BOS, for many). `parse_special=False` takes
        special tokens that occur in the text as ordinary characters: use it for text that others wrote.
        """
        try:
            text.encode()  # here, since `tokenizers` names no position
        except UnicodeEncodeError as error:
            raise RequestError(f"The text isn't valid Unicode: it holds a lone surrogate at position {error.start}.") from error
        if not parse_special:
            return self._text_encoder().encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD, ids beyond the vocabulary become nothing."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.append(ids) + detokenizer.finish()

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A streaming decoder for one sequence, which continues `prompt_ids` where they are given."""
        return IncrementalDetokenizer(self._token_bytes, skip_ids=self._specials if skip_special_tokens else (), prompt_ids=prompt_ids)

    def token_text(self, token_id: int) -> str:
        r"""One token as readable text, for logprobs: bytes that are no whole character are written as `\xe4`."""
        return self._token_bytes(token_id).decode("utf-8", errors="backslashreplace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; those of a text are its tokens' joined, save for a leading dummy space."""
        return self._token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which `skip_special_tokens` hides."""
        return token_id in self._specials

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> str:
        """The conversation as the text that `apply_chat_template` tokenises. Same arguments, same errors."""
        marker = chat.SpecialTokenMarker(self._specials.values())
        text = self._render(marker, messages, add_generation_prompt, continue_final_message, tools, template_options)
        return marker.unmark(text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> list[int]:
        """The ids of a conversation, through the checkpoint's chat template.

        `messages` and `tools` are as in OpenAI's API. `add_generation_prompt` opens the assistant's turn;
        `continue_final_message` leaves the last message open instead, so that the model goes on writing it.
        `template_options` are the variables that this template reads beside the usual ones (`enable_thinking`, ...). Special
        tokens inside messages are text. Raises RequestError for messages that are malformed or that the template refuses, for
        an option that the template doesn't know, and for a model without a template.
        """
        marker = chat.SpecialTokenMarker(self._specials.values())
        text = self._render(marker, messages, add_generation_prompt, continue_final_message, tools, template_options)
        if not marker.marked_any and not self._special_by_normalised_text:
            return self.encode(text, add_special_tokens=False)
        encoder = self._text_encoder()
        return encoder.encode(marker.unmark(encoder.protect(text)), add_special_tokens=False)

    def _render(
        self,
        marker: chat.SpecialTokenMarker,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        template_options: Mapping[str, Any],
    ) -> str:
        """The template's text, with the special tokens of the caller's strings still marked."""
        template = chat.select_template(self._source.chat_templates, with_tools=bool(tools))
        chat.check_options(template_options, self._source.special_texts)
        if continue_final_message and add_generation_prompt:
            reason = "add_generation_prompt and continue_final_message exclude each other: one opens a turn, the other goes on with one."
            raise RequestError(reason, param="continue_final_message")
        try:
            plain = chat.normalise_messages(messages, self._specials.values())
            end = chat.open_final_message(plain) if continue_final_message else ""
            marked: list[Any] = [{**marker.mark(message), "role": message["role"]} for message in plain]
            variables = {
                **self._source.special_texts,
                "messages": marked,
                "tools": marker.mark(tools),
                "add_generation_prompt": add_generation_prompt,
            }
            text = self._templates.render(template, variables, marker.mark(template_options))
        except RecursionError as error:
            raise RequestError("the messages, tools or template options are nested too deeply", param="messages") from error
        return chat.cut_at(text, end) if continue_final_message else text

    def _text_encoder(self) -> TextOnlyEncoder:
        with self._lock:
            if self._text_only is None:
                self._text_only = TextOnlyEncoder(self._backend)
            return self._text_only
