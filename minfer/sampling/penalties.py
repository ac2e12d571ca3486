"""Repetition, presence and frequency penalties: lower the logits of tokens already seen.

Which tokens were seen, and how often, is kept per request and grows with its output: counting again each step would cost
time proportional to the length, and a [S, V] count matrix would have to be cleared each step. What is kept is a list of
the distinct tokens with their counts, so a step reads and writes that many logits and no more.

The state belongs to this processor, not to the request, which stays plain ints and lists. It is a cache: an entry is
found by the prompt's identity and the seed, brought in line with the output as it now is (after a rejected draft, some
tokens are gone), and dropped when it hasn't been used for a while; a dropped one is counted anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minfer.sampling.processors import SamplingRow
from minfer.sampling_params import SamplingParams


class TokenHistory:
    """The distinct tokens of one request: `ids` [n] int64, `counts` [n] in the output, `in_prompt` [n]."""

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.prompt = prompt
        self._vocab_size = vocab_size
        seen = np.unique(np.asarray(prompt, dtype=np.int64))
        seen = seen[seen < vocab_size]  # ids past the logits (of another modality, say) can't be picked
        self._size = len(seen)
        self._ids: NDArray[np.int64] = np.resize(seen, max(64, 2 * self._size)) if self._size else np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._in_prompt = np.arange(len(self._ids)) < self._size
        self._entry = {token: entry for entry, token in enumerate(seen.tolist())}
        self._output: list[int] = []

    def follow(self, output: Sequence[int]) -> None:
        """Makes the counts those of `output`, at the cost of what changed since the last call."""
        output = output if isinstance(output, list) else list(output)
        same = len(self._output)
        if output[:same] != self._output:
            pairs = zip(self._output, output, strict=False)
            same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(same, len(output)))
        for token in self._output[same:]:
            self._counts[self._entry[token]] -= 1
        del self._output[same:]
        for token in output[same:]:
            entry = self._entry_of(token)  # first: it may replace the array
            self._counts[entry] += 1
            self._output.append(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self._size]

    @property
    def in_prompt(self) -> NDArray[np.bool_]:
        return self._in_prompt[: self._size]

    def _entry_of(self, token: int) -> int:
        entry = self._entry.get(token)
        if entry is None:
            entry = self._entry[token] = self._size
            if entry == len(self._ids):
                self._grow()
            self._ids[entry] = token
            self._size += 1
        return entry

    def _grow(self) -> None:
        more = len(self._ids)
        self._ids = np.concatenate((self._ids, np.zeros(more, dtype=np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(more, dtype=np.float32)))
        self._in_prompt = np.concatenate((self._in_prompt, np.zeros(more, dtype=np.bool_)))


class Penalties:
    """Applies the three penalties, in vLLM's order and with its meaning.

    - repetition (tokens of prompt and output): a positive logit is divided by the penalty, a negative one multiplied (CTRL,
      arXiv 1909.05858);
    - frequency (output only): minus penalty x number of times; presence (output only): minus penalty once.
    """

    def __init__(self, vocab_size: int, spare_histories: int = 256) -> None:
        self._vocab_size = vocab_size
        self._spare = spare_histories
        self._histories: OrderedDict[tuple[int, int], TokenHistory] = OrderedDict()

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        wanted = [(index, row) for index, row in enumerate(rows) if _penalised(row.params)]
        if not wanted:
            return
        at: list[NDArray[np.int64]] = []
        tokens: list[NDArray[np.int64]] = []
        factors: list[NDArray[np.float32]] = []
        offsets: list[NDArray[np.float32]] = []
        for index, row in wanted:
            history = self._history(row)
            params, counts = row.params, history.counts
            seen = (counts > 0) | history.in_prompt
            at.append(np.full(len(counts), index))
            tokens.append(history.ids)
            factors.append(np.where(seen, np.float32(params.repetition_penalty), np.float32(1)))
            offsets.append(np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty) * (counts > 0))
        while len(self._histories) > self._spare + len(wanted):
            self._histories.popitem(last=False)
        self._apply(logits, np.stack((np.concatenate(at), np.concatenate(tokens))), np.concatenate(factors), np.concatenate(offsets))

    @staticmethod
    def _apply(logits: Tensor, entries: NDArray[np.int64], factors: NDArray[np.float32], offsets: NDArray[np.float32]) -> None:
        rows, tokens = torch.from_numpy(entries).to(logits.device)
        factor, offset = torch.from_numpy(np.stack((factors, offsets))).to(logits.device)
        values = logits[rows, tokens]
        values = torch.where(values > 0, values / factor, values * factor) - offset
        logits[rows, tokens] = values

    def _history(self, row: SamplingRow) -> TokenHistory:
        key = (id(row.prompt_token_ids), row.seed)  # the history holds the prompt, so its id stays its own
        history = self._histories.get(key)
        if history is None:
            history = self._histories[key] = TokenHistory(row.prompt_token_ids, self._vocab_size)
        else:
            self._histories.move_to_end(key)
        history.follow(row.output_token_ids)
        return history


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
