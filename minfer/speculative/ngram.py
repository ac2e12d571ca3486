"""Prompt lookup: the next tokens are guessed to be those that followed the same words earlier in the prompt or output.

Costs no model at all, and is hard to beat where the answer repeats its source: summaries with quotes, code edits, extraction
(Saxena, "Prompt lookup decoding", 2023). The search is the one of LZ77 compressors: a hash from every run of `min_match`
tokens to its last position, each position chained to the run's previous one. The longest match wins, the newest among equals;
like there, a match may run into its own copy, so a period is continued for as long as wanted.

Per step it costs a dictionary entry for each new token and a comparison for each of a few candidates: microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative.policy import Bar

MAX_CANDIDATES = 16  # positions tried; in text that repeats a run more often than that, the newest ones are the ones to copy
MAX_MATCH = 32  # a longer match is no better
FORGET = 16  # requests that are over, whose index may still be held


class NgramIndex:
    """The runs of one sequence. `tokens` is the sequence itself, kept by reference: it may only grow between calls."""

    def __init__(self, tokens: Sequence[int], min_match: int) -> None:
        self._tokens = tokens
        self._min = min_match
        self._last: dict[tuple[int, ...], int] = {}  # run -> where its newest occurrence ends
        self._previous: list[int] = []  # end of a run -> end of the occurrence before it, -1 if there is none

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest earlier occurrence of the sequence's end; none if there is none."""
        self._index()
        tokens, end = self._tokens, len(self._tokens) - 1
        if count < 1 or end < self._min:
            return []
        best, longest = -1, 0
        candidate = self._previous[end]
        for _ in range(MAX_CANDIDATES):
            if candidate < 0 or longest == MAX_MATCH:
                break
            length = self._common_suffix(candidate, end)
            if length > longest:
                best, longest = candidate, length
            candidate = self._previous[candidate]
        if best < 0:
            return []
        period = end - best
        copied = list(tokens[best + 1 : best + 1 + count])
        while len(copied) < count:  # the copy has reached the sequence's end, and goes on in itself
            copied.append(copied[-period])
        return copied

    def _index(self) -> None:
        tokens, size = self._tokens, self._min
        for end in range(len(self._previous), len(tokens)):
            if end + 1 < size:
                self._previous.append(-1)
                continue
            run = tuple(tokens[end + 1 - size : end + 1])
            self._previous.append(self._last.get(run, -1))
            self._last[run] = end

    def _common_suffix(self, a: int, b: int) -> int:
        """The length of the match that ends at `a` < `b`, known to be at least `min_match`."""
        tokens, length = self._tokens, self._min
        while length < MAX_MATCH and length <= a and tokens[a - length] == tokens[b - length]:
            length += 1
        return length


class NgramProposer:
    """An index for each request that was drafted for; `min_match` tokens must agree before a continuation is copied."""

    after: Sequence[int] = ()
    tells_chances = False

    def __init__(self, min_match: int) -> None:
        self.min_match = min_match
        self._indices: dict[Request, NgramIndex] = {}

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Text has no blocks."""

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        if len(self._indices) > FORGET + 2 * len(scheduled):
            self._indices = {item.request: self._indices[item.request] for item in scheduled if item.request in self._indices}

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        return [self._index(request).continuation(count) for request, count in zip(requests, counts, strict=True)]

    def _index(self, request: Request) -> NgramIndex:
        found = self._indices.get(request)
        if found is None:
            found = self._indices[request] = NgramIndex(request.token_ids, self.min_match)
        return found
