"""Seam 5: a `LogitsProcessor` changes the rows of one batched call, in place, before anything is picked.

A processor sees the whole batch at once, so that it can edit all its rows in a few tensor calls, and skips the rows whose
request doesn't ask for it, so that a plain request costs nothing beyond the question. Grammar masks are processors too.
The built-in ones here set or add to single entries: the logit bias, bad words, min-tokens; penalties, which have a state,
are in `penalties.py`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from minfer.sampling_params import SamplingParams

K = TypeVar("K")
V = TypeVar("V")


class SamplingRow(Protocol):
    """What the sampler asks of one row of logits: a request at one position.

    A `Request` is such a row for its next token. A row for a later position (verifying a draft) differs only in
    `output_token_ids`, which then ends in the drafted tokens; it should share the request's `prompt_token_ids` object and
    `seed`, by which the penalties recognise it. Of a row whose parameters don't look back, the newest tokens may not be known yet
    and be missing from `output_token_ids`; `position`, the number of tokens before the one to be drawn, counts them.
    """

    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...  # from `derive_seed`
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def output_token_ids(self) -> Sequence[int]: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    @property
    def position(self) -> int: ...


class LogitsProcessor(Protocol):
    """Changes `logits` ([S, V] float32, row i belonging to `rows[i]`) in place, touching only the rows that need it."""

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None: ...


class IdentityCache(Generic[K, V]):
    """Remembers `make(key)` by the key's identity, for the last few keys.

    Parameters hold dicts and tuples that cost more to hash than to use; the same object comes back every step. An entry
    keeps its key alive, so that its id can't be taken by another object.
    """

    def __init__(self, make: Callable[[K], V], capacity: int = 512) -> None:
        self._make = make
        self._capacity = capacity
        self._entries: OrderedDict[int, tuple[K, V]] = OrderedDict()

    def get(self, key: K) -> V:
        entry = self._entries.get(id(key))
        if entry is None:
            entry = (key, self._make(key))
            self._entries[id(key)] = entry
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(id(key))
        return entry[1]


class LogitBias:
    """Adds the request's `logit_bias` to the named tokens."""

    def __init__(self) -> None:
        self._split: IdentityCache[Mapping[int, float], tuple[list[int], list[float]]] = IdentityCache(
            lambda bias: (list(bias.keys()), [float(value) for value in bias.values()])
        )

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        at: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for index, row in enumerate(rows):
            if row.params.logit_bias:
                ids, biases = self._split.get(row.params.logit_bias)
                at += [index] * len(ids)
                tokens += ids
                values += biases
        if at:
            edit_entries(logits, at, tokens, values, accumulate=True)


class _BannedSequences:
    """Bad words arranged by the token before their last, so that a step looks at a few of them and not at all."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self.always: list[int] = []
        self.after: dict[int, list[tuple[list[int], int]]] = {}
        for sequence in sequences:
            *prefix, last = sequence
            if prefix:
                self.after.setdefault(prefix[-1], []).append((prefix, last))
            else:
                self.always.append(last)

    def banned(self, output: Sequence[int]) -> list[int]:
        """The tokens that would complete one of the sequences."""
        if not output or output[-1] not in self.after:
            return self.always
        completing = [last for prefix, last in self.after[output[-1]] if list(output[-len(prefix) :]) == prefix]
        return self.always + completing


class BadWords:
    """Masks each token that would complete one of the request's `bad_word_token_ids` in its output.

    The prompt doesn't count (as in vLLM): a user may mention a word that the answer must not contain.
    """

    def __init__(self) -> None:
        self._sequences: IdentityCache[tuple[tuple[int, ...], ...], _BannedSequences] = IdentityCache(_BannedSequences)

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        at: list[int] = []
        tokens: list[int] = []
        for index, row in enumerate(rows):
            if row.params.bad_word_token_ids:
                banned = self._sequences.get(row.params.bad_word_token_ids).banned(row.output_token_ids)
                at += [index] * len(banned)
                tokens += banned
        mask_entries(logits, at, tokens)


class MinTokens:
    """Masks end-of-sequence and stop tokens until `min_tokens` have been generated."""

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        at: list[int] = []
        tokens: list[int] = []
        for index, row in enumerate(rows):
            if row.params.min_tokens > len(row.output_token_ids):
                ends = (*row.eos_token_ids, *row.params.stop_token_ids)
                at += [index] * len(ends)
                tokens += ends
        mask_entries(logits, at, tokens)


class PaddedVocabulary:
    """Masks the ids behind the tokenizer's last: many models pad their vocabulary to a round number, and a pad has no text."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        logits[:, self.size :] = -math.inf


def mask_entries(logits: Tensor, at: list[int], tokens: list[int]) -> None:
    """Sets `logits[at[i], tokens[i]]` to -inf for every i."""
    if at:
        edit_entries(logits, at, tokens, [-math.inf] * len(at), accumulate=False)


def edit_entries(logits: Tensor, at: list[int], tokens: list[int], values: list[float], *, accumulate: bool) -> None:
    """Sets or adds to `logits[at[i], tokens[i]]`; tokens past the vocabulary can't be picked anyway and are left out."""
    if max(tokens) >= logits.shape[1]:
        inside = [i for i, token in enumerate(tokens) if token < logits.shape[1]]
        at, tokens, values = [at[i] for i in inside], [tokens[i] for i in inside], [values[i] for i in inside]
    where = torch.tensor([at, tokens], dtype=torch.int64).to(logits.device)
    logits.index_put_((where[0], where[1]), torch.tensor(values, dtype=logits.dtype).to(logits.device), accumulate=accumulate)
