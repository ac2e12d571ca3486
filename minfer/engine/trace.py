"""`Trace`: every step of the engine as events that https://ui.perfetto.dev and chrome://tracing show (`--trace FILE`).

One track shows the steps, each with its parts (schedule, build, forward, sample, wait, update, output; where steps overlap, the first
four are the next step's); a track for each request shows when it arrived, said its first token and ended; counters show the batch (prompt
tokens, generated tokens and drafts of the step), the queue and the blocks. Format: "Trace Event Format", JSON array (Google, 2016).

The file is valid JSON at every moment, also when the process is killed: each addition is one write over the closing bracket that
ends in a new one. When one fails (a full disk), the bracket is put back, a warning is logged, and the engine goes on untraced.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

from minfer.engine.core import CoreStep
from minfer.engine.watch import Watcher
from minfer.errors import ConfigError
from minfer.scheduler import Request, Scheduler

logger = logging.getLogger("minfer.engine")

Event = dict[str, Any]

_CLOSING = b"\n]\n"
_STEPS = {"pid": 1, "tid": 1}
_PARTS = ("schedule", "build", "forward", "sample", "wait", "update")


class TraceFile:
    """A JSON array that grows. Raises ConfigError if the file can't be made."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise ConfigError(f"trace {path!r} can't be written: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        self._end = 0  # where the closing bracket stands
        self.broken = False
        names = {"process_name": "minfer", "thread_name": "engine"}
        self.append([{"ph": "M", "name": name, **_STEPS, "args": {"name": value}} for name, value in names.items()])

    def append(self, events: Sequence[Event]) -> None:
        if self.broken or not events:
            return
        text = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events).encode()
        data = (b",\n" if self._end else b"[\n") + text
        try:
            whole = os.pwrite(self._file, data + _CLOSING, self._end) == len(data) + len(_CLOSING)
            reason = "only a part of it was written"
        except OSError as error:
            whole, reason = False, error.strerror or str(error)
        if whole:
            self._end += len(data)
        else:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self.broken = True
        logger.warning("the trace %s ends here, and the engine goes on without: %s", self.path, reason)
        try:
            if self._end:  # where the bracket was there is room for it
                os.pwrite(self._file, _CLOSING, self._end)
            os.ftruncate(self._file, self._end + len(_CLOSING) if self._end else 0)
        except OSError as error:
            logger.warning("the trace %s could not be closed: %s", self.path, error.strerror)


class Trace(Watcher):
    def __init__(self, file: TraceFile, scheduler: Scheduler) -> None:
        self.file = file
        self.scheduler = scheduler
        self._begun: set[Request] = set()  # requests that have said a token

    def added(self, requests: Sequence[Request], arrived: float) -> None:
        sizes = {"prompt_tokens": requests[0].num_prompt_tokens}
        self.file.append([_of_request("b", request, arrived, **sizes) for request in requests])

    def stepped(self, step: CoreStep, started: float, ended: float) -> None:
        events = [_span("step", started, ended, _details(step)), *_parts(step, started, ended)]
        events += self._counters(step, started)
        for item in step.plan.scheduled:
            if item.drawn and item.request not in self._begun:
                self._begun.add(item.request)
                events.append({**_of_request("n", item.request, ended), "name": "first token"})
        self.file.append(events)

    def ended(self, requests: Sequence[Request], at: float) -> None:
        self._begun.difference_update(requests)
        self.file.append([_of_request("e", r, at, finish_reason=r.finish_reason, output_tokens=len(r.output_token_ids)) for r in requests])

    def _counters(self, step: CoreStep, at: float) -> list[Event]:
        """The step's own numbers stand at its beginning; those of queue and blocks are as it left them."""
        prompt = drafts = 0
        for item in step.plan.scheduled:
            prompt += max(0, min(item.start + item.num_new_tokens, item.request.num_prompt_tokens) - item.start)
            drafts += len(item.drafts)
        own = step.plan.num_tokens - prompt - drafts
        scheduler = self.scheduler
        values: dict[str, dict[str, int]] = {
            "batch, tokens": {"prompt": prompt, "generated": own, "drafts": drafts},
            "requests": {"running": len(scheduler.running), "waiting": scheduler.num_waiting},
            "blocks": {"used": scheduler.pool.num_used},
        }
        return [{"ph": "C", "name": name, "pid": 1, "ts": _us(at), "args": counts} for name, counts in values.items()]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _span(name: str, start: float, end: float, args: Event | None = None) -> Event:
    span = {"ph": "X", "name": name, **_STEPS, "ts": _us(start), "dur": round(_us(end) - _us(start), 1)}
    return span if args is None else {**span, "args": args}


def _parts(step: CoreStep, started: float, ended: float) -> list[Event]:
    """One after the other, as they ran; the rest of the step is text: detokenising and stop strings."""
    spans, at = [], started
    for part in _PARTS:
        until = min(ended, at + getattr(step.times, part))
        spans.append(_span(part, at, until))
        at = until
    return [*spans, _span("output", at, ended)]


def _details(step: CoreStep) -> Event:
    plan = step.plan
    return {
        "tokens": plan.num_tokens,
        "requests": {item.request.request_id: item.num_new_tokens for item in plan.scheduled},
        "preempted": [request.request_id for request in plan.preempted],
        "copied_blocks": len(plan.copies),
    }


def _of_request(phase: str, request: Request, at: float, **args: Any) -> Event:
    """`phase`: b begins the request's track, e ends it, n is a moment on it."""
    identity = {"name": request.request_id, "cat": "request", "id": request.request_id}
    return {"ph": phase, **identity, "pid": 1, "ts": _us(at), "args": args}
