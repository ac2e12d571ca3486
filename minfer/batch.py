"""`Batch`: one step, flattened for the model.

The scheduler hands every request some number of tokens; this is the same decision as tensors. There is no prefill and no
decode in it: a prompt, a chunk of one, a single new token and a row of drafts differ only in how many tokens they bring.

Example with block_size 4, request A computing tokens 4..6 of its prompt and request B its token 9:

    token_ids    a4 a5 a6 b9        the new tokens of all requests, back to back                       [T]
    positions     4  5  6  9        where each stands in its own sequence                              [T]
    slots        20 21 22 37        where its K and V go: block x block_size + offset                  [T]
    query_start   0        3  4     request r owns tokens query_start[r] : query_start[r + 1]          [R + 1]
    seq_lens            7 10        tokens each request has in the KV cache once these are written     [R]
    block_tables   2 5 .  1 8 9     the blocks of each request, in order                               [R, B]
    logits_at     2 3               the tokens whose next-token logits are wanted                      [S]

Drafts that branch are rows of one token, beside the row of the trunk that they leave. Such a token's position is a draft's that has a slot
already, so it is written behind the trunk, and `tails` says where the keys of its own way lie. Request B drafts x y after its
token b9, and z in the place of y:

    token_ids    b9 x  y  z         positions  9 10 11 11         slots  37 38 39 32        query_start  0     3  4
    seq_lens     12 12              tails      -, 11 32           keys of z: positions 0..10 by the block table, 11 in slot 32

To every kernel a branch is a sequence like any other, whose last keys lie elsewhere: no mask, and the order of additions is by position
in both, so a token's result is the same bits whether it was drafted in a chain, in a tree, or not at all.

Requests may each want another LoRA adapter. `lora` says which rows go through which one; without it, all go through the model as it is.

`shared` lets a kernel read what all requests begin with once, not once for each; whoever ignores it computes the same. Those tokens fill
their blocks, and are older than every new one.

It is an argument of every call that needs it: nothing about a step is global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(slots=True)
class LoraRows:
    """Which rows of a step an adapter changes: sorted by adapter, and cut into tiles of one adapter each.

    Of four requests, A with adapter 2, B with none, C with 1 and D with 2, cut at `tile_rows` 4:

        token_ids   a0 a1 b0 c0 d0 d1 d2
        rows         3   0  1  4  5  6                   numbers of rows, by adapter
        tiles       (1, 0, 1)  (2, 1, 4)  (2, 5, 1)      adapter, where it begins in `rows`, how many
        groups      (1, 0, 1)  (2, 1, 5)                 the same uncut, on the host

    A tile of adapter 0 is empty: what a replayed step, whose number of tiles is fixed, has over.
    """

    rows: torch.Tensor  # [N] int32
    tiles: torch.Tensor  # [M, 3] int32
    groups: list[tuple[int, int, int]]
    tile_rows: int


@dataclass(slots=True)
class Batch:
    """Index tensors on the model's device; the lists beside them are the host's own copy, so that nobody has to sync."""

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    slots: torch.Tensor  # [T] int64, block x block_size + offset
    query_start: torch.Tensor  # [R + 1] int32
    seq_lens: torch.Tensor  # [R] int32
    block_tables: torch.Tensor  # [R, B] int32; entries past a request's last block are some valid block, to be ignored
    logits_at: torch.Tensor  # [S] int64
    query_lens_host: list[int]  # R entries
    seq_lens_host: list[int]  # R entries
    tails: torch.Tensor | None = None  # [R, 1 + D] int64: a position, and the slots of the keys from there on; None without branches
    lora: LoraRows | None = None  # None where no row has an adapter
    padded: Batch | None = None  # the same step where a CUDA graph finds it (`runner/upload.py`); None where no graph serves it
    shared: torch.Tensor | None = None  # [1] int32: leading tokens that all requests have in the same blocks; None: not worth a thought
    shared_host: int = 0  # the same number

    # `tails[r, 0]` of a row all of whose keys lie where the block table says.
    NO_TAIL: ClassVar[int] = 2**62

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_requests(self) -> int:
        return self.seq_lens.shape[0]
