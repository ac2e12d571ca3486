"""`Request`: one sequence being generated. A prompt asked for `n` times is n requests that share their prompt's blocks.

Nothing in it says "prefill" or "decode". A request has tokens, and some of them have been computed:

    token_ids   p0 p1 p2 p3 p4 p5 | o0 o1          prompt | output
    computed    ###############                    num_computed_tokens = 5
                               ^^^^^^^^^           3 tokens left; a step may take any number of them

When the last token is computed, its logits give the next one, and the request has one token left again.

`num_computed_tokens` counts what was handed to the model. A step that is under way will bring a token that nobody on the host knows
yet; `num_pending` counts those, so that the next step can be decided, and begun, before they are known.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from minfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minfer.scheduler.prefix_cache import PrefixNode

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]  # of the prompt's final hidden states: which makes the embedding


class RequestStatus(enum.Enum):
    WAITING = "waiting"  # new, or preempted
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"  # holds nothing


@dataclass(eq=False, slots=True)
class Request:
    """Identity is the object. `arrival` is a counter, unique in an engine, that orders requests; times are in seconds."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total_tokens: int  # prompt plus output, the model's and the request's limits combined
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    arrival: int = 0
    priority: int = 0
    tenant: str = ""  # on whose account it runs
    turn: int = 0  # its place in a fair order, and the tokens it was charged for; the policy's notes
    charged: int = 0
    adapter: int = 0  # number of the LoRA adapter it runs with, from 1; 0: none
    cache_key: Hashable = None  # what besides the tokens changes the KV: adapter, salt
    pooling: Pooling | None = None  # set: an embedding is wanted of the prompt, and no token is generated
    fork_of: Request | None = None  # a sibling with the same prompt, whose blocks may be shared once they are computed

    output_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(init=False)
    ending_ids: frozenset[int] = field(init=False)  # tokens that may end it
    draft_token_ids: list[int] = field(default_factory=list)  # guesses of the next tokens, for the next step only
    draft_parents: list[int] = field(default_factory=list)  # where they branch, which of them each follows, from 1; 0: the newest token
    num_computed_tokens: int = 0
    num_pending: int = 0  # tokens that steps under way are drawing: the device will know them before the host does
    blocks: list[int] = field(default_factory=list)  # the block table; it grows in place, any other change makes a new list
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string, where one ended it

    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache or a sibling, at first admission
    num_preemptions: int = 0
    published_blocks: int = 0  # leading blocks that stand in the prefix cache
    published_node: PrefixNode | None = None  # the last of them

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.ending_ids = frozenset((*self.params.stop_token_ids, *(() if self.params.ignore_eos else self.eos_token_ids)))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that have yet to be handed to the model, pending ones included; none where the pending one is the last there may be."""
        tokens = len(self.token_ids) + self.num_pending
        return 0 if self.num_pending and tokens >= self.max_total_tokens else tokens - self.num_computed_tokens

    @property
    def position(self) -> int:
        """Where the token will stand that the newest step under way is drawing."""
        return len(self.token_ids) + self.num_pending - 1

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt token's hidden state is wanted, so that none may come from the prefix cache."""
        return self.params.prompt_logprobs is not None or self.pooling == "mean"

    def append(self, token: int) -> None:
        self.token_ids.append(token)
        self.output_token_ids.append(token)

    def cut(self, count: int) -> None:
        """Takes back all output after its first `count` tokens; only for a request that is finished."""
        del self.output_token_ids[count:]
        del self.token_ids[self.num_prompt_tokens + count :]

    def why_finished(self) -> tuple[FinishReason, int | None] | None:
        """Whether the newest token ends the request, and which stop token did it. Stop strings are the engine's business."""
        token, params = self.output_token_ids[-1], self.params
        if len(self.output_token_ids) >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token
            if not params.ignore_eos and token in self.eos_token_ids:
                return "stop", None
        if self.num_tokens >= self.max_total_tokens:
            return "length", None
        return None
