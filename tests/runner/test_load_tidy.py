"""Memory while weights are read: what was left of the tensors before is given back, and nothing holds on to them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

import minfer.runner.load as module

TENSORS, BYTES = 9, 1000


def test_holes_are_given_back_after_so_many_bytes_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []  # how many tensors somebody still had, each time the next was to be read
    given_back: list[int] = []  # how many tensors had been read, each time memory was given back

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(TENSORS):
            held.append(sum(ref() is not None for ref in alive))
            tensor = torch.zeros(BYTES, dtype=torch.uint8)
            alive.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor

    monkeypatch.setattr(module, "TIDY_AFTER", 2 * BYTES)
    monkeypatch.setattr(module, "return_free_memory", lambda: given_back.append(len(alive)))
    names = []
    for name, tensor in module._tidied(tensors()):
        names.append(name)
        del tensor  # as a layer does that has packed it
    assert names == [str(number) for number in range(TENSORS)]
    assert held == [0] * TENSORS
    assert given_back == [3, 6, 9, 9], "after every third tensor, and once at the end"
