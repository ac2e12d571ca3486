"""`Upload`: a step's index tensors go to the device together, in one copy; and where they lie there suits CUDA graphs.

A copy costs the host five microseconds or more however short it is, and a step has seven short tensors. So they are laid one behind the
other in pinned memory, each at a multiple of 64 bytes, because kernels read faster from addresses that 16 divides:

    slots | logits_at | (tails) | token_ids | positions | query_start | seq_lens | (shared) | (rows, tiles of LoRA adapters) | block_tables

A graph fixes every address and every grid. So a step of few tokens a request is laid out for a *bucket* (`buckets.py`), with rows and
requests of padding behind the real ones. Three requests, one of which has two drafts, in a bucket of 8 rows and 4 requests:

    token_ids, positions      t   t d d   t  |  0  0  0
    slots                     s   s s s   s  | -1 -1 -1   written nowhere
    query_start            0  1       4   5  |  5         no query: attention leaves such a request before it reads anything
    seq_lens                  n   n       n  |  0

A row of padding belongs to no request, so attention never comes by it. Where a tensor lies depends on the bucket alone, save for the block
tables, which come last because their width changes from step to step: a second copy, on the device, puts them into tables of full width.
What graphs are captured over is then `Batch.padded`. With LoRA adapters it is another one, of another graph, which has their kernels in
it; tiles that a step doesn't need say adapter 0. So it is with a shared prefix, and with drafts that branch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from minfer.batch import Batch, LoraRows
from minfer.runner.buckets import Bucket, Buckets
from minfer.runner.lora_rows import TILE_ROWS, LoraBuffers, most_tiles

Copy = Callable[[torch.Tensor, torch.Tensor], object]  # (to, from), begun and not waited for

_ALIGNMENT = 64
_PADDING = {"token_ids": 0, "positions": 0, "slots": -1, "logits_at": 0, "seq_lens": 0}  # query_start: the number of real rows
_BY_TOKEN = ("token_ids", "positions", "slots", "logits_at", "lora_rows")
_ORDER = (
    "slots", "logits_at", "tails", "token_ids", "positions", "query_start", "seq_lens", "shared", "lora_rows", "lora_tiles", "block_tables"
)  # fmt: skip


def copy_later(to: torch.Tensor, source: torch.Tensor) -> None:
    """The device's own way: the host goes on at once, and kernels launched later find the copy done."""
    to.copy_(source, non_blocking=True)


class _Layout:
    """Where the tensors of steps of one shape lie, on the host and on the device. `room`: of some, how long they are with their padding."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], room: Mapping[str, int], host: torch.Tensor, device: torch.Tensor) -> None:
        self.step: dict[str, torch.Tensor] = {}  # on the device, as long as they are
        self.padded: dict[str, torch.Tensor] = {}  # and with their padding
        self.copies: list[tuple[NDArray[Any], NDArray[Any]]] = []  # on the host, (to, from)
        begin = 0
        for name in (name for name in _ORDER if name in tensors):
            tensor = tensors[name]
            shape = (room.get(name, len(tensor)), *tensor.shape[1:])
            end = begin + math.prod(shape) * tensor.itemsize
            here = host[begin:end].view(tensor.dtype).view(shape)
            self.padded[name] = device[begin:end].view(tensor.dtype).view(shape)
            self.step[name] = self.padded[name][: len(tensor)]
            self.copies.append((here[: len(tensor)].numpy(), tensor.numpy()))
            here[len(tensor) :] = len(tensors["token_ids"]) if name == "query_start" else _PADDING.get(name, 0)
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        self.host, self.device = host[:begin], device[:begin]
        self.names = frozenset(self.padded)


class Upload:
    """For batches whose tensors are at most as large as `largest` and `largest_lora`, of a model that has so many LoRA `adapters`.

    `buckets`: of the steps for which graphs are captured; None: no step is padded. `max_len`: the longest sequence.
    """

    def __init__(
        self,
        largest: Mapping[str, torch.Tensor],
        largest_lora: LoraBuffers | None,
        max_len: int,
        device: torch.device,
        adapters: int = 0,
        buckets: Buckets | None = None,
        copy: Copy = copy_later,
    ) -> None:
        self.copy = copy
        self._max_len = max_len
        self._adapters = adapters
        self._buckets = buckets
        everything = [*largest.values(), *([largest_lora.rows, largest_lora.tiles] if largest_lora is not None else [])]
        size = sum(tensor.nbytes + _ALIGNMENT for tensor in everything)
        pin = device.type == "cuda"
        # Two, so that one can be filled while the other is on its way; on the device copies and kernels keep their order.
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._sent = [torch.cuda.Event() if pin else None for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        rows = buckets.most_requests if buckets is not None else 0
        self._tables = torch.zeros(rows, largest["block_tables"].shape[1], dtype=torch.int32, device=device)
        self._layouts: list[tuple[Mapping[str, torch.Tensor], Bucket | None, _Layout] | None] = [None, None]  # and what each was made for
        self._padded: dict[tuple[Bucket, frozenset[str]], Batch] = {}  # and which tensors it has
        self._turn = 0

    def send(
        self,
        tensors: Mapping[str, torch.Tensor],
        query_lens: list[int],
        seq_lens: list[int],
        lora: LoraRows | None = None,
        shared: int = 0,
        *,
        one_each: bool = False,
    ) -> Batch:
        """`tensors` is the same mapping for as long as it maps to the same memory, whatever is written there. `shared`: as there, if it is.

        `one_each`: every request has one token. The caller has waited for the last step but one, if that was such a step.
        """
        if lora is not None:
            tensors = {**tensors, "lora_rows": lora.rows, "lora_tiles": lora.tiles}
        self._turn = turn = 1 - self._turn
        requests = len(seq_lens)
        bucket = None if self._buckets is None else self._buckets.find(query_lens, len(tensors["token_ids"]))
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        layout = self._layout(turn, tensors, bucket)
        for to, source in layout.copies:
            to[...] = source
        self.copy(layout.device, layout.host)
        if sent is not None and not one_each:  # nobody may have to wait for such a step, so several of them may be on their way
            sent.record()
        if bucket is not None:
            tables = layout.step["block_tables"]
            self.copy(self._tables[:requests, : tables.shape[1]], tables)
        if lora is not None:
            lora = dataclasses.replace(lora, rows=layout.step["lora_rows"], tiles=layout.step["lora_tiles"])
        padded = None if bucket is None else self._padded[bucket, layout.names]
        return _batch(layout.step, query_lens, seq_lens, lora, shared, padded)

    def _layout(self, turn: int, tensors: Mapping[str, torch.Tensor], bucket: Bucket | None) -> _Layout:
        """Mostly that of two steps ago: as long as batches keep their shape, and with it the padding."""
        last = self._layouts[turn]
        if last is not None and last[0] is tensors and last[1] == bucket:
            return last[2]
        room = {}
        if bucket is not None:
            room = {**dict.fromkeys(_BY_TOKEN, bucket.tokens), **dict.fromkeys(("seq_lens", "tails"), bucket.requests)}
            room |= {"query_start": bucket.requests + 1, "lora_tiles": most_tiles(bucket.tokens, self._adapters)}
        layout = _Layout(tensors, room, self._host[turn], self._device)
        self._layouts[turn] = tensors, bucket, layout
        if bucket is not None and (bucket, layout.names) not in self._padded:
            requests = bucket.requests
            static = {**layout.padded, "block_tables": self._tables[:requests]}
            lora = LoraRows(static["lora_rows"], static["lora_tiles"], [], TILE_ROWS) if "lora_rows" in tensors else None
            # The host's numbers are what grids are made from: the longest sequences there may be, of which half may be shared.
            shared = self._max_len // 2 if "shared" in tensors else 0
            lengths = [bucket.longest] * requests, [self._max_len] * requests
            self._padded[bucket, layout.names] = _batch(static, *lengths, lora, shared, None)
        return layout


def _batch(
    tensors: Mapping[str, torch.Tensor],
    query_lens: list[int],
    seq_lens: list[int],
    lora: LoraRows | None,
    shared: int,
    padded: Batch | None,
) -> Batch:
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("lora_")}
    return Batch(**own, query_lens_host=query_lens, seq_lens_host=seq_lens, shared_host=shared, lora=lora, padded=padded)
