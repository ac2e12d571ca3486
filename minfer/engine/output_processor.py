"""New tokens -> text -> `RequestOutput`: detokenising, stop strings, log-probabilities, timings.

A `_Sequence` keeps what one sequence has said so far, a `_Group` ties the `n` sequences of a request together. The scheduler
ends sequences by token (end-of-text, stop ids, length); stop strings are only visible here, in the text, so this file is
where those end a sequence.

Every token of every request comes by, so those that ask for nothing but tokens and text have a way of their own: nothing is made for
who is told at the end, and for who is told as it comes, its newest text and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from minfer.engine.core import CoreStep
from minfer.engine.outputs import CompletionOutput, Logprob, OutputKind, PositionLogprobs, RequestMetrics, RequestOutput
from minfer.sampling import RowLogprobs
from minfer.scheduler import FinishReason, Request, ScheduledRequest
from minfer.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer

# Ends a sequence that said a stop string: the scheduler's `finish`.
Finish = Callable[[Request, FinishReason, str], None]


@dataclass(eq=False, slots=True)
class _Sequence:
    index: int
    request: Request
    detokenizer: IncrementalDetokenizer | None  # None: a model without a tokenizer says ids only
    stops: StopMatcher
    simple: bool  # alone in its group, and nobody looks for stop strings or wants scores
    text: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    pooled: torch.Tensor | None = None
    read: int = 0  # tokens of the output that text was made of
    # How much of each the caller of a delta has been given.
    sent_text: int = 0
    sent_tokens: int = 0
    told: bool = False  # also that it is over
    closed: bool = False


@dataclass(eq=False, slots=True)
class _Group:
    request_id: str
    prompt: str | None
    kind: OutputKind
    metrics: RequestMetrics
    sequences: list[_Sequence]
    prompt_logprobs: list[PositionLogprobs | None] | None
    num_open: int = 0  # sequences that go on

    @property
    def finished(self) -> bool:
        return not self.num_open


class OutputProcessor:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._groups: dict[str, _Group] = {}
        self._home: dict[Request, tuple[_Group, _Sequence]] = {}
        self._unscheduled: set[Request] = set()  # requests that no step has been about yet
        self._ended: list[Request] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, request_id: str, prompt: str | None, requests: list[Request], kind: OutputKind, arrived: float) -> None:
        sequences = [self._sequence(index, request, alone=len(requests) == 1) for index, request in enumerate(requests)]
        scores: list[PositionLogprobs | None] | None = [None] if requests[0].params.prompt_logprobs is not None else None
        group = _Group(request_id, prompt, kind, RequestMetrics(arrival_time=arrived), sequences, scores, len(sequences))
        self._groups[request_id] = group
        for sequence in sequences:
            self._home[sequence.request] = group, sequence
        self._unscheduled.update(requests)

    def ids(self) -> list[str]:
        """The requests in flight."""
        return list(self._groups)

    def requests_of(self, request_id: str) -> list[Request]:
        """The unfinished sequences of a request; none if it is unknown."""
        group = self._groups.get(request_id)
        return [s.request for s in group.sequences if not s.closed] if group else []

    def take_ended(self) -> list[Request]:
        """The sequences that are over since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def process(self, step: CoreStep, started: float, finish: Finish) -> list[RequestOutput]:
        """One step's tokens -> the outputs that callers are to see now. `started` is when the step began."""
        now = time.monotonic()
        changed: dict[_Group, None] = {}
        if self._unscheduled:
            self._note_scheduled([item.request for item in step.plan.scheduled], started)
        for request, (start, scores) in step.prompt_logprobs.items():
            self._take_prompt_scores(self._home[request][0], start, scores)
            changed[self._home[request][0]] = None
        for request, (start, vector) in step.pooled.items():
            self._pool(*self._home[request], start, vector)
            changed[self._home[request][0]] = None
        news, home = [], self._home
        for item in step.plan.scheduled:
            request, tokens = item.request, item.drawn
            if not tokens:
                continue
            group, sequence = home[request]
            metrics = group.metrics
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            metrics.last_token_time = now
            if not sequence.simple or request.finish_reason is not None:
                self._take(group, sequence, item, step.logprobs.get(request, ()), finish)
                changed[group] = None
                continue
            metrics.num_output_tokens += len(tokens)
            if group.kind == "delta":
                news.append(self._news(group, sequence, tokens))
            elif group.kind == "cumulative":
                changed[group] = None
        return news + self._emit(changed, step.failed)

    def _news(self, group: _Group, sequence: _Sequence, tokens: Sequence[int]) -> RequestOutput:
        """The next delta of a simple sequence that goes on: what `_output` makes in general."""
        request, detokenizer = sequence.request, sequence.detokenizer
        if detokenizer is None:
            text = ""
        elif len(tokens) == 1:
            text = detokenizer.next(tokens[0])
        else:
            text = detokenizer.append(tokens)
        sequence.read = sequence.sent_tokens = len(request.output_token_ids)
        completion = CompletionOutput(sequence.index, text, list(tokens))
        return RequestOutput(
            group.request_id, group.prompt, request.prompt_token_ids, [completion], False, group.metrics, None, request.num_cached_tokens
        )

    def _note_scheduled(self, requests: list[Request], started: float) -> None:
        for request in self._unscheduled.intersection(requests):
            metrics = self._home[request][0].metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or started
        self._unscheduled.difference_update(requests)

    def close(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Outputs for sequences that ended outside a step: aborted, or failed."""
        return self._emit({}, requests)

    def _emit(self, changed: dict[_Group, None], ended: Iterable[Request]) -> list[RequestOutput]:
        for request in ended:
            group, sequence = self._home[request]
            self._close(group, sequence)
            changed[group] = None
        outputs = []
        for group in changed:
            if group.finished:
                group.metrics.finished_time = time.monotonic()
                del self._groups[group.request_id]
                for sequence in group.sequences:
                    del self._home[sequence.request]
                    self._unscheduled.discard(sequence.request)
            if group.finished or group.kind != "final":
                outputs.append(self._output(group))
        return outputs

    def _take_prompt_scores(self, group: _Group, start: int, scores: Sequence[RowLogprobs]) -> None:
        if group.prompt_logprobs is not None:
            del group.prompt_logprobs[start:]  # a preempted prompt is scored again from the start
            group.prompt_logprobs += [self._position(score) for score in scores]

    def _pool(self, group: _Group, sequence: _Sequence, start: int, vector: torch.Tensor) -> None:
        # A preempted prompt begins again; the last token alone needs no sum.
        sequence.pooled = vector if sequence.pooled is None or start == 0 else sequence.pooled + vector
        if sequence.request.finished:
            self._close(group, sequence)

    def _take(self, group: _Group, sequence: _Sequence, item: ScheduledRequest, scores: Sequence[RowLogprobs], finish: Finish) -> None:
        """New tokens of a sequence: whether they say a stop string, how likely they were, whether they are the last."""
        request, count = item.request, len(item.drawn)
        if request.params.stop:
            count = self._read_until_stop(request, sequence, item.drawn, finish)
        group.metrics.num_output_tokens += count
        if sequence.logprobs is not None:
            self._score(sequence, scores[:count])
        if request.finished:
            self._close(group, sequence)

    def _score(self, sequence: _Sequence, scores: Sequence[RowLogprobs]) -> None:
        for score in scores:
            if sequence.logprobs is not None:
                sequence.logprobs.append(self._position(score))
                sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + score.logprob

    def _read_until_stop(self, request: Request, sequence: _Sequence, tokens: Sequence[int], finish: Finish) -> int:
        """Reads new tokens one by one, looking for stop strings. Returns how many of them were said."""
        before = len(request.output_token_ids) - len(tokens)
        for count in range(1, len(tokens) + 1):
            self._read(sequence, before + count)
            if sequence.stops.matched is not None:
                self._stop(request, sequence.stops.matched, before + count, finish)
                return count
        return len(tokens)

    def _stop(self, request: Request, matched: str, said: int, finish: Finish) -> None:
        """Ends a request whose `said`-th token completed a stop string; what a right guess brought after it was never said."""
        if request.finished:  # by the same token that ran into max_tokens, or by one after it
            request.finish_reason, request.stop_reason = "stop", matched
        else:
            finish(request, "stop", matched)
        request.cut(said)

    def _read(self, sequence: _Sequence, until: int) -> None:
        """Makes text of the output's tokens up to the `until`-th. Without stop strings nobody needs it before it is told."""
        request, params = sequence.request, sequence.request.params
        said = request.output_token_ids
        last = until
        if request.finish_reason == "stop" and until == len(said) and not params.include_stop_str_in_output:
            last -= 1  # a stop token is not part of the text
        piece = "" if sequence.detokenizer is None else sequence.detokenizer.append(said[sequence.read : last])
        sequence.read = until
        if params.stop and until >= params.min_tokens:  # stop strings count only once min_tokens have been said
            piece = sequence.stops.feed(piece)
        if piece:
            sequence.text.append(piece)

    def _close(self, group: _Group, sequence: _Sequence) -> None:
        if sequence.closed:
            return
        sequence.closed = True
        group.num_open -= 1
        self._ended.append(sequence.request)
        self._catch_up(sequence)
        if sequence.stops.matched is None:
            rest = "" if sequence.detokenizer is None else sequence.detokenizer.finish()
            sequence.text.append(sequence.stops.feed(rest) + sequence.stops.finish())
            if sequence.stops.matched is not None:  # decided only now that nothing can follow
                sequence.request.finish_reason, sequence.request.stop_reason = "stop", sequence.stops.matched
        group.metrics.num_preemptions += sequence.request.num_preemptions

    def _catch_up(self, sequence: _Sequence) -> None:
        """Reads what has been said since the text was last told."""
        said = len(sequence.request.output_token_ids)
        if sequence.read < said and sequence.stops.matched is None:
            self._read(sequence, said)

    def _output(self, group: _Group) -> RequestOutput:
        first = group.sequences[0].request
        completions = []
        for sequence in group.sequences:
            if group.kind != "delta":
                completions.append(self._whole(sequence))
            elif not sequence.told and (sequence.closed or sequence.sent_tokens < len(sequence.request.output_token_ids)):
                completions.append(self._delta(sequence))
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=completions,
            finished=group.finished,
            metrics=group.metrics,
            prompt_logprobs=group.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            embedding=_normalised(group.sequences[0]) if group.finished else None,
        )

    def _whole(self, sequence: _Sequence) -> CompletionOutput:
        self._catch_up(sequence)
        logprobs = None if sequence.logprobs is None else list(sequence.logprobs)
        return self._completion(sequence, "".join(sequence.text), list(sequence.request.output_token_ids), logprobs)

    def _delta(self, sequence: _Sequence) -> CompletionOutput:
        """What is new since the last delta."""
        self._catch_up(sequence)
        tokens, seen = sequence.request.output_token_ids, sequence.sent_tokens
        text = "".join(sequence.text[sequence.sent_text :])
        logprobs = None if sequence.logprobs is None else sequence.logprobs[seen:]
        sequence.sent_tokens = len(tokens)
        sequence.sent_text = len(sequence.text)
        sequence.told = sequence.closed
        return self._completion(sequence, text, tokens[seen:], logprobs)

    def _completion(
        self, sequence: _Sequence, text: str, token_ids: list[int], logprobs: list[PositionLogprobs] | None
    ) -> CompletionOutput:
        request = sequence.request
        return CompletionOutput(
            index=sequence.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=request.finish_reason if sequence.closed else None,
            stop_reason=request.stop_reason if sequence.closed else None,
        )

    def _sequence(self, index: int, request: Request, *, alone: bool) -> _Sequence:
        params, tokenizer = request.params, self.tokenizer
        skip = params.skip_special_tokens
        return _Sequence(
            index=index,
            request=request,
            detokenizer=None if tokenizer is None else tokenizer.detokenizer(request.prompt_token_ids, skip_special_tokens=skip),
            stops=StopMatcher(params.stop, params.include_stop_str_in_output),
            simple=alone and not params.stop and params.logprobs is None and params.prompt_logprobs is None,
            logprobs=[] if params.logprobs is not None else None,
        )

    def _position(self, scores: RowLogprobs) -> PositionLogprobs:
        text = self.tokenizer.token_text if self.tokenizer is not None else lambda token: ""
        position = {scores.token_id: Logprob(scores.logprob, scores.rank, text(scores.token_id))}
        for rank, (token, logprob) in enumerate(zip(scores.top_token_ids, scores.top_logprobs, strict=True), start=1):
            position[token] = Logprob(logprob, rank, text(token))
        return position


def _normalised(sequence: _Sequence) -> list[float] | None:
    """The direction of the pooled hidden state, of length 1: what embeddings are compared by. The mean's direction is the sum's."""
    if sequence.pooled is None:
        return None
    values: list[float] = torch.nn.functional.normalize(sequence.pooled, dim=0).float().tolist()
    return values
