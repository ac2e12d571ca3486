"""The small interface behind which a grammar library stands: compile a form, follow an output, say which tokens may come next.

`llguidance_library.py` and `xgrammar_library.py` are the two there are; `guided_backend` of the engine's settings picks one. Neither is
imported before somebody asks for a form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from minfer.structured_outputs import StructuredOutputsParams


class Matcher(Protocol):
    """One sequence's place in its grammar."""

    @property
    def ended(self) -> bool:
        """Whether it takes no more tokens: the form was complete and the end has been said, or it has failed."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it can't go on: a token that the grammar forbids, or a limit of the library. None while all is well."""
        ...

    def take(self, token: int) -> None:
        """The output's next token."""
        ...

    def take_drafts(self, tokens: Sequence[int]) -> int:
        """Takes tokens for as long as the grammar allows them; returns how many those were. Never fails."""
        ...

    def give_back(self, count: int) -> None:
        """Takes back the last `count` tokens that it took."""
        ...

    def branch(self) -> Matcher:
        """Another one at the same place."""
        ...

    def forced(self) -> list[int]:
        """Tokens that are bound to come next, whatever the model says; as the tokenizer would write them."""
        ...


class Library(Protocol):
    """One for an engine. Its methods may be called from several threads, a matcher's from one at a time."""

    def start(self, wish: StructuredOutputsParams) -> Matcher:
        """A matcher at the beginning of a form. Takes milliseconds to seconds. Raises RequestError for one that can't be used."""
        ...

    @property
    def num_tokens(self) -> int:
        """Width of the masks: the tokenizer's vocabulary."""
        ...

    def fill(self, matchers: Sequence[Any], bits: Tensor) -> None:
        """Sets bit i of row r of `bits` ([R, W] int32 on the host, all zero) if token i may come next in `matchers[r]`.

        `matchers` are its own. Rows are filled in parallel, in threads that hold no interpreter lock.
        """
        ...
