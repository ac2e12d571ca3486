"""Drives a `Scheduler` with a model that is a pure function of the tokens, and checks every invariant at every step.

The "KV" is a dictionary from slot to the token that was written there, so reading a wrong, stale or foreign slot is seen at
once: attention over the table must find exactly the sequence's own tokens.

With `overlap` a step is scheduled and runs before the scheduler is told of the one ahead of it, as `EngineCore` does it on a GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from minfer.sampling_params import SamplingParams
from minfer.scheduler import Request, Scheduler, SchedulerOutput, create_policy


def next_token(tokens: list[int], vocab: int = 50) -> int:
    """What the fake model says after these tokens."""
    return zlib.crc32(bytes(t % 256 for t in tokens)) % vocab


def expected_output(prompt: list[int], count: int, eos: int = -1) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


Step = tuple[SchedulerOutput, dict[Request, list[int]]]


class FakeEngine:
    def __init__(
        self, *, num_blocks: int, block_size: int = 4, policy: str = "fcfs", overlap: bool = False, eos: int = -1, **settings: object
    ) -> None:
        options: dict[str, object] = {"max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}
        self.scheduler = Scheduler(num_blocks=num_blocks, block_size=block_size, policy=create_policy(policy), **options)  # type: ignore[arg-type]
        self.memory: dict[int, int] = {}  # slot -> token
        self.requests: list[Request] = []
        self.drafts: Callable[[list[int]], list[int]] = lambda tokens: []  # what to guess after these tokens
        self.computed_per_step: list[dict[str, int]] = []
        self.overlap = overlap
        self.eos = eos
        self.ahead: Step | None = None
        self.drawn: dict[Request, list[int]] = {}  # tokens that the device has drawn and the scheduler hasn't been told of

    def add(
        self, prompt: list[int], max_tokens: int, *, n: int = 1, priority: int = 0, tenant: str = "", salt: object = None
    ) -> list[Request]:
        siblings: list[Request] = []
        for index in range(n):
            request = Request(
                request_id=f"r{len(self.requests)}",
                prompt_token_ids=list(prompt),
                params=SamplingParams(max_tokens=max_tokens, n=n),
                max_total_tokens=len(prompt) + max_tokens,
                seed=index,
                eos_token_ids=(self.eos,),
                arrival=len(self.requests),
                priority=priority,
                tenant=tenant,
                cache_key=salt,
                fork_of=siblings[0] if siblings else None,
            )
            siblings.append(request)
            self.requests.append(request)
            self.scheduler.add(request)
        return siblings

    def step(self) -> bool:
        """Ends one step, and with overlap begins the next before; False if there was nothing to run."""
        step = self.ahead or self._launch()
        if step is None:
            return False
        self.ahead = self._launch() if self.overlap else None
        plan, sampled = step
        for request in sampled:
            del self.drawn[request][0]
        self.computed_per_step.append({item.request.request_id: item.num_new_tokens for item in plan.scheduled})
        for item in plan.scheduled:
            item.drawn = sampled.get(item.request, ())
        self.scheduler.update(plan)
        self.scheduler.check_integrity()
        for request in self.scheduler.running:
            if request.num_left == 1 and not self.overlap:
                request.draft_token_ids = self.drafts(request.token_ids)
        return True

    def _launch(self) -> Step | None:
        """Decides a step and runs it on the "device", which knows every token that was drawn."""
        scheduler = self.scheduler
        plan = scheduler.schedule()
        if not plan.scheduled:
            return None
        scheduler.check_integrity()
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert not plan.one_each or all(item.samples and item.num_new_tokens == 1 and not item.drafts for item in plan.scheduled)
        size = scheduler.block_size
        for source, target in plan.copies:
            for offset in range(size):
                self.memory[target * size + offset] = self.memory.get(source * size + offset, -1)
        written: set[int] = set()
        for item in plan.scheduled:
            tokens = [*self._on_device(item.request), *item.drafts]
            for position in range(item.start, item.start + item.num_new_tokens):
                slot = item.request.blocks[position // size] * size + position % size
                assert slot not in written, "two tokens of a step in one slot"
                written.add(slot)
                self.memory[slot] = tokens[position]
        sampled = {}
        for item in plan.scheduled:
            request, end = item.request, item.start + item.num_new_tokens
            tokens = [*self._on_device(request), *item.drafts]
            seen = [self.memory.get(request.blocks[p // size] * size + p % size) for p in range(end)]
            assert seen == tokens[:end], f"{request.request_id} reads KV that is not its own"
            if item.samples:
                assert end == len(tokens), "a token is drawn after the last one there is"
                sampled[request] = self._verified(self._on_device(request), item.drafts)
        for request, drawn in sampled.items():
            self.drawn.setdefault(request, []).append(drawn[0])
        return plan, sampled

    def _on_device(self, request: Request) -> list[int]:
        return [*request.token_ids, *self.drawn.get(request, [])]

    def _verified(self, tokens: list[int], drafts: Sequence[int]) -> list[int]:
        """The model's tokens after `tokens`, for as long as the drafts say the same, and one more."""
        kept = [next_token(tokens)]
        for draft in drafts:
            if draft != kept[-1]:
                break
            kept.append(next_token([*tokens, *kept]))
        return kept

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests:
                return
            assert self.step(), "requests wait, but nothing was scheduled"
        raise AssertionError(f"not finished after {limit} steps")
