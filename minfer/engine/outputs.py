"""What a caller gets back. Field names are vLLM's, so that a script drives either engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minfer.scheduler import FinishReason

# cumulative: everything so far, at every step. delta: only what is new. final: once, when all is done.
OutputKind = Literal["cumulative", "delta", "final"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability under the raw logits, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]  # token id -> Logprob, the chosen token among them


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` sequences. In a delta, `text`, `token_ids` and `logprobs` hold the new part only."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Moments in seconds of `time.monotonic()`; None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_output_tokens: int = 0
    num_preemptions: int = 0

    @property
    def queue_s(self) -> float | None:
        """Time from arrival to the first step that the request was part of."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean over the tokens after the first."""
        if self.first_token_time is None or self.last_token_time is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_output_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """State of a request; `finished` once each of its `n` sequences is. A delta lists only the sequences that changed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV was already there
    embedding: list[float] | None = None  # of a request for one: the pooled final hidden state, [H], of length 1
