"""The words that the parent and an engine's subprocess exchange: one JSON object a line, over stdin and stdout.

The parent writes `{"op": NAME, ...}`; the worker answers each with exactly one line, `{"ok": RESULT}` or
`{"error": {"kind", "message", "traceback"}}`. Times travel with the result, after the clock has stopped, so that the
protocol itself costs a measured request nothing. This file runs inside every engine's environment: standard library only.

Ops: `load` -> facts about the loaded engine; `generate` -> traces; `score` -> log-probabilities; `next_logprobs`;
`memory` -> bytes; `prepare` (converts weights; in a process of its own); `exit`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One prompt. `arrival`: seconds after the start of the run at which it may be seen by the engine."""

    token_ids: list[int]
    max_tokens: int
    arrival: float = 0.0
    ignore_eos: bool = True


@dataclass
class Trace:
    """What became of one request. `times[i]`: seconds from the start of the run at which token i was in the caller's hands."""

    arrival: float
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Times rounded to a microsecond, which is finer than any of them is known."""
        return {**asdict(self), "times": [round(t, 6) for t in self.times]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        return cls(float(data["arrival"]), int(data["prompt_tokens"]), list(data["token_ids"]), [float(t) for t in data["times"]])


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is to be loaded; whatever it can't honour, it must refuse.

    threads: CPU threads, already pinned by the worker. max_context: longest prompt plus output. max_concurrency: most
    requests in flight. prefix_caching: on only in workloads that are about it. eos_token_ids: for requests that may stop.
    argument: what stood behind `=` in --against (a server's address).
    """

    precision: str
    device: str
    threads: int
    max_context: int
    max_concurrency: int
    prefix_caching: bool = False
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    argument: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LoadOptions:
        return cls(**{**data, "eos_token_ids": tuple(data.get("eos_token_ids", ()))})


def check_traces(requests: list[Request], traces: list[Trace], wall: float, vocab_size: int) -> None:
    """Raises ValueError when a set of traces can't be true.

    `wall` is the parent's own clock around the whole exchange: an engine whose last token comes later than that, or whose
    times run backwards, has not measured what it claims. Every rule here was broken by a fake engine in the tests first.
    """
    if len(traces) != len(requests):
        raise ValueError(f"{len(traces)} traces for {len(requests)} requests")
    for index, (request, trace) in enumerate(zip(requests, traces, strict=True)):
        who = f"request {index}"
        if len(trace.token_ids) != len(trace.times):
            raise ValueError(f"{who}: {len(trace.token_ids)} tokens but {len(trace.times)} times")
        if not trace.token_ids:
            raise ValueError(f"{who}: no token came back")
        if len(trace.token_ids) > request.max_tokens:
            raise ValueError(f"{who}: {len(trace.token_ids)} tokens where at most {request.max_tokens} were asked for")
        if request.ignore_eos and len(trace.token_ids) < request.max_tokens:
            raise ValueError(
                f"{who}: stopped after {len(trace.token_ids)} of {request.max_tokens} tokens although told to ignore end-of-text"
            )
        if any(b < a for a, b in zip(trace.times, trace.times[1:], strict=False)):
            raise ValueError(f"{who}: its times run backwards")
        if trace.times[0] <= request.arrival:
            raise ValueError(f"{who}: its first token came before it arrived")
        if trace.times[-1] > wall:
            raise ValueError(f"{who}: its last token at {trace.times[-1]:.3f} s, but the whole run took {wall:.3f} s")
        if vocab_size and not all(0 <= t < vocab_size for t in trace.token_ids):
            raise ValueError(f"{who}: a token id outside the vocabulary of {vocab_size}")
