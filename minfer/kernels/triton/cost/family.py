"""What a family of kernels has to say to be predicted: its calls, the work in their launches, and what was published to hold it against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import Launch
from minfer.kernels.triton.cost.predict import Work


@dataclass(frozen=True)
class Case:
    """A call on meta tensors. `work`: of a launch of it, by the kernel's name. Bytes and operations are those of the whole call.

    Bytes count what the call can't avoid: inputs and outputs once, none of what its launches hand to each other.
    """

    name: str
    call: Callable[[TritonBackend], Any]
    work: Callable[[str, Launch], Work]
    bytes: int
    operations: int
    unit: str = "bf16"
    devices: Sequence[str] = ("H100 SXM", "H200 SXM", "MI300X")
    compiled_as: Callable[[Launch], Launch] = lambda launch: launch  # a launch with the same code, that other cases compile too


@dataclass(frozen=True)
class Check:
    """A published time of somebody's kernel for the same work. The prediction for ours has to lie within low..high times it."""

    case: str
    device: str
    published_us: float
    source: str
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """What was changed because of a prediction: `results/gpu/predicted-FAMILY-before.json` has the figures without it."""

    title: str
    why: str
    cases: Sequence[tuple[str, str]]  # (case, device) that show it


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    cases: Sequence[Case]
    intro: str = ""
    checks: Sequence[Check] = ()
    changes: Sequence[Change] = field(default_factory=tuple)
    more: Callable[[Mapping[str, Any]], list[str]] | None = None  # lines of the page that are made from all families' results
    first: Sequence[str] = ()  # what a run on the device has to check, in this order
