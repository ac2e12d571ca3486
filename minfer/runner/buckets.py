"""The sizes of steps that CUDA graphs are captured for: a graph fixes every grid, so a step is padded to the next of these.

    one token each    as many rows as requests; fine steps where a row more is felt, coarse ones where it isn't
    a few each        drafts to verify, what a draft model has to catch up with, the end of a prompt: rows in all, and requests

Requests of the second kind bring different numbers of tokens: drafts end where guessing more doesn't pay, and many requests have none. To
give each of them as many rows as the longest may have (vLLM's uniform decode) would fill a step of 64 requests, two of which have eight
drafts, with 576 rows in place of 80. So rows stay packed, with the padding behind the last. What makes that possible is how attention's
tiles find their request: on the device, by `query_start`, and no more than T // tile + R of them, whatever the lengths are. The bound is
what the grid is made from, so it holds for every step of T rows and R requests. Rows are what a step's products cost, so their number is
rounded finely; that of requests, which costs attention programs that end at once, to a power of two.

How many tokens a request may bring decides the shape of attention's tiles, hence is fixed, too. A request with more is a prompt's, and its
step is run as it comes: there the GPU is the slower one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from minfer.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a graph has room for; `longest`: tokens of one request."""

    tokens: int
    requests: int
    longest: int = 1


class Buckets:
    """For steps of up to `requests` requests with one token each; where `longest` is above 1, also of up to `tokens` tokens of `rows`
    requests with so many each, a draft that branches off being a request.
    """

    def __init__(self, requests: int, longest: int = 1, tokens: int | None = None, rows: int | None = None) -> None:
        self.longest = longest
        self._single = ladder(requests)
        self._tokens = ladder(tokens or requests * longest)
        self._rows = _powers(rows or requests)

    @staticmethod
    def of(config: EngineConfig) -> Buckets:
        """For the steps of an engine: as many tokens of a request as it may have drafts, and one. flash_attn's call for steps of a token
        each is the one whose arguments keep their shapes.
        """
        single = config.speculative == "none" or config.attention_backend == "flash_attn"
        seqs, longest = config.max_num_seqs, 1 if single else 1 + config.num_draft_tokens
        return Buckets(seqs, longest, min(config.max_num_batched_tokens, seqs * longest), most_rows(config))

    @property
    def most_requests(self) -> int:
        return max(self._single[-1], self._rows[-1])

    @property
    def most_tokens(self) -> int:
        return max(self._single[-1], self._tokens[-1])

    def find(self, query_lens: Sequence[int], tokens: int) -> Bucket | None:
        """The smallest that holds a step; None where there is none. `tokens`: the sum."""
        requests = len(query_lens)
        if tokens == requests <= self._single[-1]:
            size = self._single[bisect_left(self._single, requests)]
            return Bucket(size, size)
        if self.longest == 1 or tokens > self._tokens[-1] or requests > self._rows[-1] or max(query_lens) > self.longest:
            return None
        size = self._tokens[bisect_left(self._tokens, tokens)]
        return Bucket(size, self._rows[bisect_left(self._rows, requests)], min(self.longest, size))


def most_rows(config: EngineConfig) -> int:
    """The most requests of a batch, a draft that branches off being one of its own."""
    branched = config.num_draft_tokens if config.draft_top_k > 1 else 0
    return min(config.max_num_batched_tokens, config.max_num_seqs * (1 + branched))


def ladder(largest: int) -> list[int]:
    """Sizes up to the largest."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4096, 64)]
    return [size for size in sizes if size < largest] + [largest]


def _powers(largest: int) -> list[int]:
    return [2**power for power in range((largest - 1).bit_length())] + [largest]
