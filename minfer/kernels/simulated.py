"""A GPU that is only played: the engine's loop runs as it is, and each kernel takes the time that a cost model says.

What it is for: to see, on any machine, whether the host keeps up with a fast GPU. Nothing is computed. A launch costs the host what
launching costs and returns; the device is a clock, at which kernels queue up one behind the other; reading a result waits for it.

    kernel seconds = max(bytes / bandwidth, operations / peak) + the gap between two kernels

That is a roofline: no kernel is faster, so a host that keeps up with it keeps up with the device. Peaks and bandwidths are the
makers' data sheets (dense, without sparsity); the gap of 1.3 us between kernels of a CUDA graph was published for the H100 (Hazy
Research, "Look Ma, No Bubbles", 2025). What a launch costs the host depends on its processor: a compiled Triton kernel 11 us,
a graph 10 us, a copy or an event 5 us are what is commonly measured, and can be changed.

torch's own small operations on the step's index tensors are done for real, on the CPU. What the simulation itself computes for a launch
is done in the time that the launch is said to cost. Left out: clocks that drop under load, kernels that
share the device, copies over the bus, whose bytes take no time here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minfer.batch import Batch, LoraRows
from minfer.errors import ConfigError
from minfer.kernels.fetch import Arrival
from minfer.kernels.lora import LoraWeights
from minfer.kernels.ops import Backend, Experts, HeadNorms, Weight
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """Bytes and operations a second, and seconds. `memory` in bytes."""

    name: str
    memory: int
    bandwidth: float
    bf16: float
    fp8: float
    gap: float = 1.3e-6  # between kernels of a graph
    launch: float = 11e-6  # of one kernel, on the host
    graph_launch: float = 10e-6  # of a whole graph, on the host
    call: float = 5e-6  # of a copy or an event, on the host


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 80 * GIB, 3.35e12, 989e12, 1979e12),
        Gpu("h200", 141 * GIB, 4.8e12, 989e12, 1979e12),
    )
}

# Bits an element of a matrix takes, scales and zero points included, and what its products are counted against.
ELEMENTS: dict[str, tuple[float, str]] = {"bf16": (16, "bf16"), "fp8": (8, "fp8"), "int4": (5, "bf16")}


def find_gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise ConfigError(f"there is no model of a GPU called {name!r}; known are {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(slots=True)
class _Recording:
    """What a captured graph takes: seconds, and seconds for each token that its attention reads."""

    seconds: float = 0.0
    per_token: float = 0.0
    lengths: torch.Tensor | None = None  # the static batch's, which the next replay fills anew


class SimulatedDevice:
    """The clock. Seconds since `reset`: `busy` with kernels, `idle` because nothing was launched, `launching` what that cost the host."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.busy = self.idle = self.launching = 0.0
        self._free_at = 0.0
        self._recording: _Recording | None = None

    def reset(self) -> tuple[float, float, float]:
        """(busy, idle, launching) since the last time."""
        spent = self.busy, self.idle, self.launching
        self.busy = self.idle = self.launching = 0.0
        return spent

    def kernel(self, num_bytes: float, operations: float = 0.0, peak: str = "bf16") -> None:
        """Launches a kernel, or adds it to the graph that is being captured."""
        begun, gpu = time.perf_counter(), self.gpu
        seconds = max(num_bytes / gpu.bandwidth, operations / getattr(gpu, peak)) + gpu.gap
        if self._recording is None:
            self._host(begun, gpu.launch)
            self._queue(seconds)
        else:
            self._recording.seconds += seconds

    def attention(self, num_bytes: float, bytes_per_token: float, operations_per_pair: float, batch: Batch) -> None:
        """Launches attention, which reads all keys and values once. In a graph, whose lengths only a replay knows, that is all it takes:
        the few tokens of a request that a graph serves have operations for a fraction of that time.
        """
        if self._recording is None:
            lengths = batch.seq_lens_host
            pairs = sum(new * (end - (new - 1) / 2) for new, end in zip(batch.query_lens_host, lengths, strict=True))
            self.kernel(num_bytes + bytes_per_token * sum(lengths), operations_per_pair * pairs)
        else:
            self.kernel(num_bytes)
            self._recording.per_token += bytes_per_token / self.gpu.bandwidth
            self._recording.lengths = batch.seq_lens

    def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], Sequence[torch.Tensor]]:
        """Stands in for the capture of a CUDA graph (`runner/decode_graphs.py`)."""
        self._recording = graph = _Recording()
        try:
            out = run()
        finally:
            self._recording = None

        def replay() -> Sequence[torch.Tensor]:
            begun = time.perf_counter()
            seconds = graph.seconds + (0.0 if graph.lengths is None else graph.per_token * int(graph.lengths.sum()))
            self._host(begun, self.gpu.graph_launch)
            self._queue(seconds)
            return out

        return replay

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Begins a copy to or on the device. Its bytes take no time, but those who come later find them there."""
        begun = time.perf_counter()
        to.copy_(source)
        self._host(begun, self.gpu.call)

    def call(self, count: int) -> None:
        """Begins so many copies or events, whose bytes nobody needs."""
        self._host(time.perf_counter(), count * self.gpu.call)

    def fetch(self, *tensors: torch.Tensor) -> Arrival:
        """Begins to bring tensors to the host, as `kernels/fetch.py` does."""
        self.call(len(tensors) + 1)
        done = self._free_at

        def wait() -> list[Any]:
            _wait_until(done)
            return [tensor.tolist() for tensor in tensors]

        return wait

    def _host(self, begun: float, seconds: float) -> None:
        """The host is busy with a launch for so long, from `begun`."""
        self.launching += seconds
        _wait_until(begun + seconds)

    def _queue(self, seconds: float) -> None:
        now = time.perf_counter()
        if now > self._free_at:
            self.idle += now - self._free_at
            self._free_at = now
        self._free_at += seconds
        self.busy += seconds


def _wait_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        if left > 1e-3:
            time.sleep(left - 5e-4)


class SimulatedWeight(Weight):
    def __init__(self, device: SimulatedDevice, shape: Sequence[int], element: str, zero: torch.Tensor) -> None:
        self.shape = torch.Size(shape)
        self._device = device
        self._bits, self.peak = ELEMENTS[element]
        self._zero = zero

    @property
    def nbytes(self) -> int:
        return int(self.shape.numel() * self._bits / 8)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, (outputs, inputs) = x.shape[0], self.shape
        self._device.kernel(self.nbytes + 2 * rows * (inputs + outputs), 2.0 * rows * outputs * inputs, self.peak)
        return self._zero.expand(rows, outputs)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        self._device.kernel(4.0 * ids.shape[0] * self.shape[1])
        return self._zero.expand(ids.shape[0], self.shape[1])


class SimulatedExperts(Experts):
    """All of a layer. As many of them are read as tokens were sent to, each to another while there are enough."""

    def __init__(self, device: SimulatedDevice, gate_up: Sequence[Weight], down: Sequence[Weight], zero: torch.Tensor) -> None:
        self._device, self._zero = device, zero
        self._sides = gate_up, down

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for side in self._sides for weight in side)

    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        renormalize: bool,
        kind: str,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        pairs, experts = x.shape[0] * top_k, router_logits.shape[1]
        for _ in range(3):  # routing and sorting: nothing but launches
            self._device.kernel(4.0 * pairs)
        for first, *_ in self._sides:
            (outputs, inputs), read = first.shape, min(pairs, experts)
            moved = read * first.nbytes + 2 * pairs * (inputs + outputs)
            self._device.kernel(moved, 2.0 * pairs * outputs * inputs, first.peak if isinstance(first, SimulatedWeight) else "bf16")
            self._device.kernel(6.0 * pairs * outputs)  # the activation; the weighted sum
        return self._zero.expand(x.shape[0], x.shape[1])


class SimulatedBackend(Backend):
    """Every op as a kernel of that many bytes; the tensors that come out are one zero, shown in the right shape.

    `element` is that of all matrices but those with `vocab_size` rows, which stay in 16 bits. Tokens are drawn at random, a few
    of `words`, so that there is something to detokenise and, as in a server that runs for a while, little of it is new.
    """

    name = "simulated"

    def __init__(self, device: SimulatedDevice, element: str, vocab_size: int, words: Sequence[int]) -> None:
        if element not in ELEMENTS:
            raise ConfigError(f"weights can be simulated as {', '.join(ELEMENTS)}, not {element!r}")
        self.device = device
        self.element = element
        self.vocab_size = vocab_size
        self.fetch = device.fetch
        self._zero = torch.zeros(1, 1)
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.tensor(words)[torch.randint(len(words), (8192,), generator=generator)]
        self._drawn = 0

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        element = "bf16" if weight.shape[0] == self.vocab_size else self.element
        return SimulatedWeight(self.device, weight.shape, element, self._zero)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.device.kernel(2.0 * x.numel() * 4)
        return x, x

    def experts(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> Experts | str:
        return SimulatedExperts(self.device, gate_up, down, self._zero)

    def rotary_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        cache: LayerCache,
        slots: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> None:
        self.device.kernel(2.0 * 2 * (q.numel() + k.numel() + v.numel()))

    def attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        batch: Batch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens, heads, dim = q.shape
        self.device.attention(4.0 * q.numel(), 2.0 * cache.kv_heads * cache.format.row_bytes(dim), 4.0 * heads * dim, batch)
        return self._zero[:, :, None].expand(tokens, heads, dim)

    def act_mul(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        self.device.kernel(3.0 * x.numel())
        return self._zero.expand(x.shape[0], x.shape[1] // 2)

    def lora(self, y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> None:
        raise ConfigError("LoRA adapters can't be simulated yet; leave lora out")

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        self.device.kernel(4.0 * logits.numel())
        return self._pick(logits.shape[0])

    def sample(self, logits: torch.Tensor, wishes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.device.kernel(2 * 4.0 * logits.numel())
        return self._pick(logits.shape[0])

    def forbid(self, logits: torch.Tensor, bits: torch.Tensor, rows: torch.Tensor | None) -> None:
        self.device.call(1)
        self.device.kernel(4.0 * bits.numel() * (1 + 2 * 32))

    def _pick(self, rows: int) -> torch.Tensor:
        if self._drawn + rows > len(self._tokens):
            self._drawn = 0
        picked = self._tokens[self._drawn : self._drawn + rows]
        self._drawn += rows
        return picked
