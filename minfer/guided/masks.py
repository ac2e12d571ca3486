"""`GrammarMasks`: the logits processor that keeps each request inside its grammar.

For each row it brings a matcher in line with the request's output, asks it which tokens may come next (a bit for each token), and sets
all other logits to -inf. When the form is complete, what is left is the end-of-sequence token. Like the penalties' histories, a
matcher is a cache entry found by the prompt's identity and the seed: a preempted request finds it again, and one that was dropped
meanwhile is made anew from the output. Rows that verify drafts of a request get a matcher each, branched off the request's own.

What may come next depends on the tokens that the model is given, not on what it makes of them. So the masks of a step can be filled
beside it: `begin` has a thread do so, and the call that follows the model's run takes what is there.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from minfer.guided.compiler import Grammar
from minfer.guided.library import Matcher
from minfer.sampling import SamplingRow

logger = logging.getLogger("minfer.guided")

Forbid = Callable[[Tensor, Tensor, Tensor | None], None]  # (logits [S, V], bits [R, W] on the host, rows [R] on the host or None)


class GrammarMasks:
    """The output must not hold tokens that other processors force against the grammar; bans beside it are refused up front.

    `forbid` is the op table's, or None where masks are applied by torch. `pinned`: masks are filled in memory that a GPU reads by
    itself, so that nobody waits for them to be on it.
    """

    def __init__(self, spare_matchers: int = 256, forbid: Forbid | None = None, *, pinned: bool = False) -> None:
        self._spare = spare_matchers
        self._forbid = forbid
        self._pinned = pinned
        self._followers: OrderedDict[tuple[int, int, int], _Follower] = OrderedDict()
        self._penalties: Tensor | None = None
        self._thread = ThreadPoolExecutor(1, "masks")  # starts no thread before there is a mask to fill
        self._begun: tuple[Sequence[SamplingRow], Future[Tensor]] | None = None
        self.num_masks = 0  # counters: rows masked so far, and the seconds that the loop spent on it or waited for it
        self.seconds = 0.0

    def begin(self, rows: Sequence[SamplingRow]) -> None:
        """Fills the masks of `rows` in a thread, for the call with the same `rows` that follows when the model has run."""
        self._end()
        at = _guided(rows)
        if len(at) > 1:  # for one row, waking the thread and taking a core from the model costs as much as it spares
            self._begun = rows, self._thread.submit(self._allowed, rows, at)

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        at = _guided(rows)
        if not at:
            return
        started = time.perf_counter()
        allowed = self._end(rows)
        if allowed is None:
            allowed = self._allowed(rows, at)
        masked = None if len(at) == len(rows) else torch.tensor(at, pin_memory=self._pinned)
        if self._forbid is not None:
            self._forbid(logits, allowed, masked)
        else:
            if self._penalties is None or self._penalties.device != logits.device:
                self._penalties = _penalties(logits.device)
            _forbid_by_table(logits, allowed, masked, self._penalties)
        while len(self._followers) > self._spare + len(at):
            self._followers.popitem(last=False)
        self.num_masks += len(at)
        self.seconds += time.perf_counter() - started

    def _end(self, rows: Sequence[SamplingRow] | None = None) -> Tensor | None:
        """Waits for what was begun, and returns it if it was for `rows`: a step that failed leaves masks that nobody asks for."""
        if self._begun is None:
            return None
        (begun, future), self._begun = self._begun, None
        allowed = future.result()
        return allowed if begun is rows else None

    def _allowed(self, rows: Sequence[SamplingRow], at: list[int]) -> Tensor:
        followers: dict[_Follower, None] = {}
        for index in at:
            follower = self._follower(rows[index])
            if follower in followers:  # a second row of a request is for a later position, after drafts: its own matcher stays where it is
                follower = follower.branch(rows[index].output_token_ids)
            else:
                follower.follow(rows[index].output_token_ids)
            followers[follower] = None
        return self._fill(list(followers))

    def forced(self, row: SamplingRow) -> list[int]:
        """The tokens that must come next in the row's output, as its tokenizer would write them; none where there is a choice."""
        follower = self._follower(row)
        follower.follow(row.output_token_ids)
        return [] if follower.matcher.ended else follower.matcher.forced()

    def _follower(self, row: SamplingRow) -> _Follower:
        grammar = row.params.grammar
        assert isinstance(grammar, Grammar), "the input processor put it there"
        key = (id(row.prompt_token_ids), row.seed, id(grammar))  # the entry keeps all three alive, so their ids stay theirs
        follower = self._followers.get(key)
        if follower is None:
            follower = self._followers[key] = _Follower(grammar, row.prompt_token_ids)
        else:
            self._followers.move_to_end(key)
        return follower

    def _fill(self, followers: list[_Follower]) -> Tensor:
        """[R, W] int32, on the host: bit i of a row says whether token i may come next. Zero where a matcher has failed."""
        library = followers[0].grammar.library  # one engine has one
        bits = torch.zeros(len(followers), -(-library.num_tokens // 32), dtype=torch.int32, pin_memory=self._pinned)
        library.fill([follower.matcher for follower in followers], bits)
        for index, follower in enumerate(followers):
            if follower.astray:
                bits[index] = -1  # behind a draft that the grammar forbids: what is drawn here is thrown away
            elif follower.failed():
                bits[index] = 0  # nothing may come: the sampler reports the row, and the engine ends the request
        return bits


class _Follower:
    """One sequence's way through its grammar."""

    def __init__(self, grammar: Grammar, prompt: Sequence[int], matcher: Matcher | None = None) -> None:
        self.grammar = grammar
        self.prompt = prompt
        self.matcher = matcher or grammar.matcher()
        self.astray = False  # the draft it followed left the grammar
        self._output: list[int] = []
        self._consumed = 0  # of the output: what follows the end is no business of the grammar

    def branch(self, output: Sequence[int]) -> _Follower:
        """A follower of this sequence's output as it would be with its drafts."""
        other = _Follower(self.grammar, self.prompt, self.matcher.branch())
        drafts = [] if other.matcher.ended else list(output[len(self._output) :])
        taken = other.matcher.take_drafts(drafts)
        other.astray = taken < len(drafts) and not other.matcher.ended
        return other

    def follow(self, output: Sequence[int]) -> None:
        """Brings the matcher in line with the output, which usually has grown by one token; a rejected draft made it shorter."""
        output = output if isinstance(output, list) else list(output)
        same = len(self._output)
        if output[:same] != self._output:
            pairs = zip(self._output, output, strict=False)
            same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(same, len(output)))
        if same < self._consumed:
            self.matcher.give_back(self._consumed - same)
            self._consumed = same
        del self._output[same:]
        for token in output[same:]:
            self._output.append(token)
            if not self.matcher.ended:
                self.matcher.take(token)
                self._consumed += 1

    def failed(self) -> bool:
        """Whether the matcher is at a limit. The grammar isn't given to later requests then, since its matchers share state."""
        failure = self.matcher.failure
        if failure is None:
            return False
        if not self.grammar.spoiled:
            self.grammar.spoiled = True
            logger.warning("a grammar stopped after %d tokens: %.300r", len(self._output), failure)
        return True


def _guided(rows: Sequence[SamplingRow]) -> list[int]:
    return [index for index, row in enumerate(rows) if row.params.grammar is not None]


def _penalties(device: torch.device) -> Tensor:
    """[256, 8] float32: what to add to eight logits, by the byte of a mask that speaks of them: 0 where its bit is set, else -inf."""
    bits = torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8, dtype=torch.int32) & 1
    return torch.where(bits == 1, 0.0, -math.inf).to(device)


def _forbid_by_table(logits: Tensor, allowed: Tensor, rows: Tensor | None, penalties: Tensor) -> None:
    """Sets what `allowed` [R, W] doesn't name to -inf, in the `rows` of `logits` [S, V], or in all.

    A table of bytes, because looking eight logits up and adding is several times faster than unpacking bits to fill by them.
    """
    by_eight = allowed.view(torch.uint8).to(logits.device).int()  # [R, 4W], lowest bit first: the same order on every little-endian machine
    added = torch.nn.functional.embedding(by_eight, penalties).view(len(allowed), -1)[:, : logits.shape[1]]  # [R, <= V]
    known = added.shape[1]
    if rows is None:
        logits[:, :known] += added
        logits[:, known:] = -math.inf  # a padded vocabulary: its ids have no text
    else:
        rows = rows.to(logits.device)
        logits[rows, :known] += added
        logits[rows, known:] = -math.inf
