"""`EngineCore`: the loop. Token ids in, token ids out; it knows no text, no clock and no threads.

decide what to run  ->  run it  ->  sample  ->  remember

With speculation, "sample" gives a token for every drafted position too, and "remember" keeps those that turned out right.

A device that runs beside the host need not wait for it: with *overlap*, the next step is decided, built and launched before this one's
tokens are waited for. The device passes them on itself, and what the host does with them, it does while the next step runs.

    host    launch 1 | launch 2 | wait 1 | remember 1, text | launch 3 | wait 2 | remember 2, text | launch 4 ..
    device             step 1 ...........| step 2 ............................. | step 3 ....................

It is the same loop and gives the same tokens. A request that ends with a token of step 1 has a row in step 2, which is thrown away;
one whose next token depends on the ones before by more than the model (penalties, a grammar, drafts) makes the loop wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from minfer.errors import ConfigError
from minfer.kvcache import KVCache
from minfer.models import Model
from minfer.runner import BatchBuilder, DraftHead, LoadedModel, ModelRunner, Newest, RowSpan
from minfer.runner.buckets import Buckets, most_rows
from minfer.runner.decode_graphs import DecodeGraphs
from minfer.runner.graphs import Graph, Step, can_capture, can_capture_on_gpu, capture_with_adapters
from minfer.sampling import Drawn, LogitsProcessor, RowLogprobs, Sampler, SamplerOutput, SamplingRow, prompt_logprobs
from minfer.scheduler import Request, ScheduledRequest, Scheduler, SchedulerOutput, create_policy
from minfer.speculative import (
    DraftModelProposer,
    DraftRow,
    Forced,
    ForcedDrafts,
    NgramProposer,
    Proposer,
    Speculation,
    accepted,
    head_proposer,
    trunk,
    way,
)

# Rows of logits scored at a time for prompt log-probabilities: 256 x 128k vocabulary in float32 is 128 MiB.
SCORING_ROWS = 256

Scores = tuple[int, list[RowLogprobs]]  # (position, scores of the tokens from there on)
Pooled = tuple[int, torch.Tensor]  # (position, sum of the hidden states from there on that the embedding is made of, [H] float64)


@dataclass(slots=True)
class StepTimes:
    """Seconds spent in each part of the loop, and in how many steps: what the host costs beside the model.

    On a GPU `forward` and `sample` launch what the device is to do, and `wait` is for the device.
    """

    steps: int = 0
    schedule: float = 0.0
    build: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    wait: float = 0.0
    update: float = 0.0

    def add(self, other: StepTimes) -> None:
        self.steps += other.steps
        self.schedule += other.schedule
        self.build += other.build
        self.forward += other.forward
        self.sample += other.sample
        self.wait += other.wait
        self.update += other.update


@dataclass(slots=True)
class CoreStep:
    """What a step did. The tokens that requests got (several where drafts were right) are in the plan's items; here is what few ask for:
    scores of those tokens, in their order, scores of prompt tokens, and parts of embeddings.
    """

    plan: SchedulerOutput
    logprobs: dict[Request, list[RowLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[Request, Scores] = field(default_factory=dict)
    pooled: dict[Request, Pooled] = field(default_factory=dict)
    failed: list[Request] = field(default_factory=list)  # ended with "error": the model gave no distribution to sample from
    times: StepTimes = field(default_factory=StepTimes)  # of the turn of the loop that ended it: another step may have been launched


@dataclass(slots=True)
class _UnderWay:
    """A step that was launched."""

    plan: SchedulerOutput
    rows: Sequence[SamplingRow]  # what is being drawn, and for whom
    drawn: Drawn
    looks_back: bool  # whether one of the rows has to know this step's token before the next one can be drawn
    scores: dict[Request, Scores] = field(default_factory=dict)
    pooled: dict[Request, Pooled] = field(default_factory=dict)


class EngineCore:
    """`proposer` takes the place of the one that the config asks for; to watch a model's inner states, say. `forced` names the
    tokens that the form of a request's output leaves no choice about. `begin` is told before the model runs what will be drawn
    after it. `may_overlap` is False where a processor wants to see all tokens of requests that don't look back themselves.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        processors: Sequence[LogitsProcessor] = (),
        proposer: Proposer | None = None,
        forced: Forced | None = None,
        begin: Callable[[Sequence[SamplingRow]], None] = lambda rows: None,
        *,
        may_overlap: bool = True,
    ) -> None:
        config = loaded.config
        self.loaded = loaded
        self.scheduler = Scheduler(
            num_blocks=loaded.cache.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prefill_chunk=config.max_prefill_chunk,
            policy=create_policy(config.policy),
            prefix_caching=config.prefix_caching,
        )
        self.sampler = _sampler(loaded, processors)
        self._begin = begin
        proposers = [proposer] if proposer is not None else _proposers(loaded, self.scheduler, processors)
        self.speculation = Speculation(proposers, config.num_draft_tokens, config.adaptive_drafts) if proposers else None
        self.forced = None if forced is None or not _drafts_forced(loaded) else ForcedDrafts(forced)
        after = next((proposer.after for proposer in proposers if proposer.after), ())  # of one at most: the others look at the text
        adapters = len(config.adapters)
        graph = _graph(loaded, loaded.model, loaded.cache, after, adapters)
        self.runner = ModelRunner(loaded.model, loaded.cache, _builder(loaded, adapters), graph, after)
        self.overlaps = may_overlap and not proposers and config.overlaps(loaded.device.type)
        self.times = StepTimes()
        self._ahead: _UnderWay | None = None  # the step after the one whose outcome was returned last
        self._rows: Sequence[SamplingRow] = ()  # of the last launch
        self._looks_back = False  # whether one of them does

    @torch.inference_mode()
    def step(self) -> CoreStep:
        """One turn of the loop: the outcome of one step. With nothing to do it is that of an empty step."""
        times = StepTimes(1)
        step = self._ahead or self._launch(times)
        if step is None:
            return CoreStep(SchedulerOutput())
        self._ahead = self._launch(times, step) if self._may_run_ahead_of(step) else None
        launched = time.perf_counter()
        sampled = step.drawn.wait()
        known = time.perf_counter()
        times.wait = known - launched
        done = self._remember(step, sampled)
        if self.speculation is not None:  # drafts make every part of a step longer, deciding what it computes and what stands included
            verified = time.perf_counter() - known
            self.speculation.ran(step.plan, times.schedule + times.build + times.forward + times.sample + times.wait + verified)
        settled = self.forced.draft(step.plan.scheduled) if self.forced is not None and step.looks_back else ()  # as grammars do
        if self.speculation is not None:
            self.speculation.draft(step.plan, self.runner.states, settled)
        times.update = time.perf_counter() - known
        done.times = times
        self.times.add(times)
        return done

    def _may_run_ahead_of(self, step: _UnderWay) -> bool:
        """Whether the next step can be launched before this one's tokens are known to the host."""
        return self.overlaps and not step.looks_back

    def _launch(self, times: StepTimes, before: _UnderWay | None = None) -> _UnderWay | None:
        """Decides a step and has the device begin it; None where there is nothing to run. `before` is the step still under way."""
        t0 = time.perf_counter()
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return None
        t1 = time.perf_counter()
        built = self.runner.build_seconds
        if self.speculation is not None:
            self.speculation.copy_blocks(plan.copies)
        rows, looks_back, logits, scores, pooled = self._forward(plan, before)
        t2 = time.perf_counter()
        positions = self.runner.positions
        every = positions.shape[0] == len(rows)  # one is drawn behind each of the step's tokens: the device knows where
        drawn = self.sampler.draw(logits, rows, positions if every else None)
        built = self.runner.build_seconds - built
        times.schedule += t1 - t0
        times.build += built
        times.forward += t2 - t1 - built
        times.sample += time.perf_counter() - t2
        return _UnderWay(plan, rows, drawn, looks_back, scores, pooled)

    def _forward(
        self, plan: SchedulerOutput, before: _UnderWay | None
    ) -> tuple[Sequence[SamplingRow], bool, torch.Tensor, dict[Request, Scores], dict[Request, Pooled]]:
        """Launches the model over a step. Returns what is to be drawn, whether any of it looks back, the logits that decide it, [S, V],
        and what else was asked for.
        """
        requests = [item.request for item in plan.scheduled]
        newest = None if before is None else _newest(plan, requests, before)
        scores: dict[Request, Scores] = {}
        pooled: dict[Request, Pooled] = {}
        if plan.one_each:
            looks_back = self._meet(requests)
            hidden = self.runner.run_one_each(requests, [item.start for item in plan.scheduled], newest)
            return requests, looks_back, self.runner.logits(hidden), scores, pooled
        spans: list[RowSpan] = []
        wanted = [_add_spans(item, spans) for item in plan.scheduled]
        rows, at = _sampling_rows(plan, wanted)
        looks_back = self._meet(rows)
        hidden = self.runner.run(spans, plan.copies, newest)  # [S, H], the rows that spans ask for
        if len(at) < len(hidden):  # somebody wants more of them than to draw the next token
            scores, pooled = self._score_prompts(plan, wanted, hidden), _pool(plan, wanted, hidden)
        return rows, looks_back, self.runner.logits(hidden if len(at) == len(hidden) else hidden[at]), scores, pooled

    def _meet(self, rows: Sequence[SamplingRow]) -> bool:
        """Whether a row has to know the tokens before the one to be drawn. Who works on those beside the model is told to begin."""
        if rows != self._rows:  # mostly they are those of the step before
            self._rows, self._looks_back = rows, any(row.params.looks_back for row in rows)
        if self._looks_back:
            self._begin(rows)
        return self._looks_back

    def _remember(self, step: _UnderWay, sampled: SamplerOutput) -> CoreStep:
        # Some may have been aborted since it was launched.
        scores = {request: score for request, score in step.scores.items() if not request.finished}
        pooled = {request: vector for request, vector in step.pooled.items() if not request.finished}
        logprobs, failed = self._verify(step.plan, sampled)
        for request in failed:
            self.scheduler.finish(request, "error")
        self.scheduler.update(step.plan)
        return CoreStep(step.plan, logprobs, scores, pooled, failed)

    def _verify(self, plan: SchedulerOutput, sampled: SamplerOutput) -> tuple[dict[Request, list[RowLogprobs]], list[Request]]:
        """Gives the plan's items their new tokens. Returns those tokens' scores where they were asked for, and the requests for which
        there was no distribution to draw one of them from.
        """
        logprobs: dict[Request, list[RowLogprobs]] = {}
        failed: list[Request] = []
        if plan.one_each and not sampled.failed:
            for item, token in zip(plan.scheduled, sampled.token_ids, strict=True):
                item.drawn = [token]
            if any(sampled.logprobs):
                pairs = zip(plan.scheduled, sampled.logprobs, strict=True)
                logprobs = {item.request: [scores] for item, scores in pairs if scores is not None}
            return logprobs, failed
        row = 0
        for item in plan.scheduled:
            if not item.samples:
                continue
            start, row = row, row + 1 + len(item.drafts)
            if item.request.finished:
                continue
            item.kept = accepted(item.drafts, item.parents, sampled.token_ids[start:row])
            at = [start, *(start + number for number in item.kept)]
            if any(bad in at for bad in sampled.failed):
                failed.append(item.request)
                continue
            item.drawn = [sampled.token_ids[i] for i in at]
            logprobs[item.request] = [scores for i in at if (scores := sampled.logprobs[i]) is not None]
            if item.drafts and (self.forced is None or not self.forced.verified(item)) and self.speculation is not None:
                self.speculation.verified(item)
            if item.parents:
                self._join_branch(item)
        return logprobs, failed

    def _join_branch(self, item: ScheduledRequest) -> None:
        """Brings the KV of right drafts that branched off to where their positions are."""
        size, blocks = self.scheduler.block_size, item.request.blocks
        newest = item.start + item.num_new_tokens - len(item.drafts) - 1
        moved = [(newest + number, newest + depth) for depth, number in enumerate(item.kept, 1) if number != depth]
        if moved:
            slots = [(blocks[old // size] * size + old % size, blocks[new // size] * size + new % size) for old, new in moved]
            self.runner.cache.move_slots(slots)

    def _score_prompts(self, plan: SchedulerOutput, wanted: list[int], hidden: torch.Tensor) -> dict[Request, Scores]:
        """Log-probabilities of the prompt tokens that this step's tokens predict, for the requests that want them."""
        scores: dict[Request, Scores] = {}
        row = 0
        for item, logits in zip(plan.scheduled, wanted, strict=True):
            request = item.request
            if _wants_scores(item):
                # Token i predicts token i + 1, so the prompt's last token scores nothing.
                targets = request.prompt_token_ids[item.start + 1 : item.start + item.num_new_tokens + 1]
                k = request.params.prompt_logprobs or 0
                scores[request] = (item.start + 1, self._score(hidden[row : row + len(targets)], targets, k))
            row += logits
        return scores

    def _score(self, hidden: torch.Tensor, targets: list[int], k: int) -> list[RowLogprobs]:
        scored: list[RowLogprobs] = []
        for start in range(0, len(targets), SCORING_ROWS):
            part = slice(start, start + SCORING_ROWS)
            scored += prompt_logprobs(self.runner.logits(hidden[part]), targets[part], k)
        return scored


def _drafts_forced(loaded: LoadedModel) -> bool:
    """Whether forced tokens enter a step together. A recorded step on the CPU takes any number of tokens; one that is replayed from a
    CUDA graph takes a few of each request, so there a longer run would cost everybody in the batch the graph."""
    config = loaded.config
    return config.forced_tokens == "on" or (config.forced_tokens == "auto" and not (loaded.device.type == "cuda" and config.graphs))


def _sampler(loaded: LoadedModel, processors: Sequence[LogitsProcessor]) -> Sampler:
    ops = loaded.ops
    return Sampler(loaded.model_config.vocab_size, loaded.device, processors, ops.argmax, ops.sample, ops.fetch, ops.logprobs)


def _builder(loaded: LoadedModel, adapters: int = 0) -> BatchBuilder:
    """`adapters`: how many the model has that its batches are for."""
    config = loaded.config
    depth = config.num_draft_tokens if config.draft_top_k > 1 else 0
    sizes = (config.max_num_batched_tokens, most_rows(config), loaded.max_model_len, config.block_size)
    shared = config.shared_prefix if loaded.ops.chosen["attention"] == "triton" else 0  # others don't look at it
    buckets = Buckets.of(config) if _on_gpu(loaded) else None
    return BatchBuilder(*sizes, loaded.device, depth, adapters, buckets, shared_prefix=shared)


def _on_gpu(loaded: LoadedModel) -> bool:
    """Whether decode steps are replayed from CUDA graphs."""
    return loaded.device.type == "cuda" and loaded.config.graphs and can_capture_on_gpu(loaded.ops)


def _graph(loaded: LoadedModel, model: Model, cache: KVCache, after: Sequence[int] = (), adapters: int = 0) -> Graph | None:
    """The model's step recorded for every batch up to the largest, on a GPU for decode steps; None where the kernels can't be recorded."""
    config = loaded.config
    if _on_gpu(loaded):
        return _decode_graphs(loaded)(lambda batch: model.forward_states(batch, cache, after))
    if not config.graphs or not can_capture(loaded.ops):
        return None
    largest = (config.max_num_batched_tokens, config.max_num_seqs)
    return capture_with_adapters(lambda batch: model.forward_states(batch, cache, after), loaded.ops, *largest, adapters)


def _decode_graphs(loaded: LoadedModel) -> Callable[[Step], Graph]:
    """What makes CUDA graphs of a step."""
    most_tokens = Buckets.of(loaded.config).most_tokens
    return lambda step: DecodeGraphs(step, most_tokens=most_tokens)


def _proposers(loaded: LoadedModel, scheduler: Scheduler, processors: Sequence[LogitsProcessor]) -> list[Proposer]:
    """Who guesses ahead, in the order in which they are asked; nobody when one token is decoded at a time."""
    ways = loaded.config.speculative.split("+")
    lookup: list[Proposer] = [NgramProposer(loaded.config.ngram_min_match)] if "ngram" in ways else []
    return [*lookup, _model_proposer(loaded, scheduler, processors)] if {"draft", "skip"} & {*ways} else lookup


def _model_proposer(loaded: LoadedModel, scheduler: Scheduler, processors: Sequence[LogitsProcessor]) -> Proposer:
    """The smaller model, the head or the layers that --speculative asks."""
    config, draft = loaded.config, loaded.draft
    sampler = _sampler(loaded, processors)
    if config.speculative == "skip":
        kept = config.layers_kept(loaded.model_config.num_layers)
        model, cache = loaded.model.with_layers(kept), loaded.cache.with_layers(kept)
        adapters = len(config.adapters)  # it has the layers' own
        runner = ModelRunner(model, cache, _builder(loaded, adapters), _graph(loaded, model, cache, adapters=adapters))
        return DraftModelProposer(runner, sampler, scheduler.reserve, config.max_num_batched_tokens, shares_cache=True)
    assert draft is not None, "load_model reads what --speculative draft asks"
    if config.draft_top_k > 1:
        _check_branching(loaded, draft)
    if isinstance(draft, DraftHead):
        limits = (config.max_num_batched_tokens, config.max_num_seqs, config.draft_top_k)
        graphs = _decode_graphs(loaded) if _on_gpu(loaded) else None
        builder, reserve = _builder(loaded), scheduler.reserve
        return head_proposer(draft, loaded.model, builder, sampler, reserve, *limits, loaded.ops, graphs, record=config.graphs)
    graph = _graph(loaded, draft.model, draft.cache)
    runner = ModelRunner(draft.model, draft.cache, _builder(loaded), graph)
    return DraftModelProposer(runner, sampler, scheduler.reserve, config.max_num_batched_tokens)


def _check_branching(loaded: LoadedModel, draft: object) -> None:
    if not isinstance(draft, DraftHead) or draft.config.kind == "redrafter":
        raise ConfigError("draft_top_k above 1 needs an EAGLE, EAGLE-3 or Medusa head as draft_model: others draft one token a place")
    if draft.config.vocab_size < loaded.config.draft_top_k:
        raise ConfigError(f"draft_top_k {loaded.config.draft_top_k} is more than the {draft.config.vocab_size} ids that the head knows")


def _wants_scores(item: ScheduledRequest) -> bool:
    request = item.request
    return request.params.prompt_logprobs is not None and item.start < request.num_prompt_tokens - 1


def _pool(plan: SchedulerOutput, wanted: list[int], hidden: torch.Tensor) -> dict[Request, Pooled]:
    """What this step adds to the embeddings under way. In float64, so that chunks add up to the same as one piece."""
    pooled: dict[Request, Pooled] = {}
    row = 0
    for item, logits in zip(plan.scheduled, wanted, strict=True):
        if item.request.pooling is not None and logits:
            pooled[item.request] = item.start, hidden[row : row + logits].double().sum(0).cpu()
        row += logits
    return pooled


def _add_spans(item: ScheduledRequest, spans: list[RowSpan]) -> int:
    """Adds the rows of one request: its tokens and drafts, and a row for each draft that branches off, in the drafts' order.

    Returns how many of their logits are wanted.
    """
    if item.request.pooling is not None:
        logits = item.num_new_tokens if item.request.pooling == "mean" else int(item.completes_prompt)
    else:
        logits = item.num_new_tokens if _wants_scores(item) else (1 + len(item.drafts) if item.samples else 0)
    if not item.drafts:
        spans.append(RowSpan(item.request, item.start, item.num_new_tokens, logits))
        return logits
    straight = trunk(len(item.drafts), item.parents)
    branched = len(item.drafts) - straight
    count = item.num_new_tokens - branched
    spans.append(RowSpan(item.request, item.start, count, logits - branched, item.drafts[:straight]))
    newest = item.start + count - straight - 1
    for number in range(straight + 1, len(item.drafts) + 1):
        on_way = way(number, item.parents)
        tail = [newest + draft for depth, draft in enumerate(on_way, 1) if draft != depth]
        spans.append(RowSpan(item.request, newest + len(on_way), 1, 1, item.drafts[number - 1 : number], tail))
    return logits


def _newest(plan: SchedulerOutput, requests: list[Request], before: _UnderWay) -> Newest:
    """Which tokens of this step are those that the step before it is drawing: the last one of everybody who had a row there."""
    if requests == before.rows:
        return Newest(before.drawn.tokens)
    row_of = {row: index for index, row in enumerate(before.rows)}
    at, rows, end = [], [], 0
    for item in plan.scheduled:
        end += item.num_new_tokens
        row = row_of.get(item.request)
        if row is not None:
            at.append(end - 1)
            rows.append(row)
    return Newest(before.drawn.tokens, at, rows)


def _sampling_rows(plan: SchedulerOutput, wanted: list[int]) -> tuple[list[SamplingRow], list[int]]:
    """What to draw, and which of the step's hidden rows decides it: after a request's last token, and after each draft."""
    rows: list[SamplingRow] = []
    at: list[int] = []
    row = 0
    for item, logits in zip(plan.scheduled, wanted, strict=True):
        row += logits
        if item.samples:
            rows.append(item.request)
            if not item.drafts:
                at.append(row - 1)
                continue
            for number in range(1, len(item.drafts) + 1):
                rows.append(DraftRow(item.request, [item.drafts[draft - 1] for draft in way(number, item.parents)]))
            at += range(row - 1 - len(item.drafts), row)
    return rows, at
