"""The op table: every numerical thing a layer may ask for, and who does it on this machine.

A layer calls `ops.attention(...)`; the table was filled once, at load, from an ordered list of backends:

    flash_attn  the library, for attention alone, where it is asked for
    triton      CUDA and ROCm
    cpu         compiled C++
    reference   plain torch, runs anywhere; the ground truth that the others are tested against

For each op the first backend in the list that has it is taken; the choice is logged and `Ops.chosen` shows it. There is no
fall-back at call time: an argument that the chosen kernel can't handle is an error that says so.

Matrices are handed to `prepare` once, which asks the same list, in order, to repack them into a layout of its own. The
first backend that takes the matrix also multiplies by it. A quantised matrix that no backend has a kernel for is dequantised
here, once and for good, and the log says so: that costs memory, where multiplying by it as it is would cost every step.

Ops return new tensors, except `rotary_kv` and `lora`, which work in place. They take tensors whose last axes are
contiguous and whose first stride is free, so q, k and v may be slices of one product. Models compute through ops and
nothing else: that is what makes a step recordable below them (ARCHITECTURE, seam 3).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minfer.batch import Batch, LoraRows
from minfer.errors import ConfigError, ModelLoadError
from minfer.kernels.fetch import Arrival, fetch
from minfer.kernels.lora import LoraWeights
from minfer.kvcache import FORMATS, LayerCache
from minfer.quant import PackedWeight

logger = logging.getLogger("minfer.kernels")

_NormPair = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
_Logprobs = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

OP_NAMES = ("rms_norm", "rotary_kv", "attention", "act_mul", "argmax", "lora")


class Weight(ABC):
    """A matrix [N, K] in the layout of the backend that prepared it."""

    shape: torch.Size

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory the matrix occupies."""

    @abstractmethod
    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x[T, K] -> x @ weight.T + bias, [T, N], in x's dtype."""

    @abstractmethod
    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """ids[T] -> rows of the matrix, [T, K], in the model's dtype."""


class Experts(ABC):
    """The matrices of all experts of a layer, in the layout of the backend that joined them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory the matrices occupy."""

    @abstractmethod
    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        renormalize: bool,
        kind: str,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """What `Ops.moe` documents."""


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """Rows [T, K] as 8-bit codes [T, K] and float32 scales [T, groups], in the form of the one matrix that they were made for."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


Rows = torch.Tensor | RoundedRows
HeadNorms = tuple[torch.Tensor, torch.Tensor, float]  # weights [D] of q's heads and of k's, and epsilon (Qwen3)


class RoundingWeight(Weight):
    """A matrix that rounds its rows to 8 bits, and lets the op before it do so: one launch and one trip of the rows to memory less."""

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> tuple[Rows, torch.Tensor]:
        """`Ops.rms_norm`, its first result rounded, or not, as the kernels like it better."""

    @abstractmethod
    def act_mul(self, x: torch.Tensor, kind: str) -> Rows:
        """`Ops.act_mul`, its result rounded, or not."""

    @abstractmethod
    def linear_rounded(self, x: RoundedRows, bias: torch.Tensor | None) -> torch.Tensor:
        """`linear` of rows that one of the above has rounded."""


class Backend(ABC):
    """A set of kernels. It implements any of `OP_NAMES` as methods with the signatures that `Ops` documents."""

    name: str
    kv_formats: Sequence[str] = tuple(FORMATS)  # of the KV cache, that its rotary_kv and attention know
    instead: str = "--backend reference"  # what helps where it can't

    @abstractmethod
    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        """The matrix repacked, or the reason for declining it. `dtype` is that of the activations."""

    def reason_against_cache(self, head_dim: int, block_size: int) -> str | None:
        """Why its attention can't read a KV cache of such heads and blocks, if it can't: what it does, and what to do."""
        return None

    def prepare_lora(self, weights: LoraWeights) -> LoraWeights:
        """The adapters of a product in the layout that this backend's `lora` reads."""
        return weights

    def stack(self, parts: Sequence[Weight]) -> Weight:
        """Matrices that this backend prepared, whose products stand side by side in one output."""
        return StackedWeight(parts)

    def experts(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> Experts | str:
        """The experts of a layer joined, given their prepared matrices [2I, H] and [H, I], or the reason for declining them."""
        return "has no mixtures of experts"


class StackedWeight(Weight):
    """Matrices over the same inputs that can't be one, because they are quantised differently."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = list(parts)
        self.shape = torch.Size((sum(part.shape[0] for part in parts), parts[0].shape[1]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        outputs = [part.shape[0] for part in self.parts]
        biases = [None] * len(outputs) if bias is None else bias.split(outputs)
        return torch.cat([part.linear(x, own) for part, own in zip(self.parts, biases, strict=True)], dim=-1)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        raise ConfigError("matrices that are quantised differently can't be one table of embeddings")


class Ops:
    """The table. Attributes are bound when it is built, so a call costs one attribute look-up."""

    def __init__(self, backends: Sequence[Backend], dtype: torch.dtype) -> None:
        self.backends = list(backends)
        self.dtype = dtype
        self.chosen: dict[str, str] = {}
        for op in OP_NAMES:
            backend = next((b for b in backends if hasattr(b, op)), None)
            if backend is None:
                raise ConfigError(f"no kernel for {op!r}: tried {', '.join(b.name for b in backends) or 'nothing'}")
            implementation: Callable[..., Any] = getattr(backend, op)
            setattr(self, "_" + op, implementation)
            self.chosen[op] = backend.name
        # What the sampler can do without; None where no backend has it, and it composes the same from torch operations.
        # sample: (logits [S, V] float32, wishes [S, 6] float64: the lower and the upper 32 bits of a seed, temperature, top-k or 0, top-p,
        # min-p; positions [S] int32 or int64 of the rows' newest tokens) -> tokens [S] int64, drawn with what Philox4x32-10 makes of the
        # seed and the position behind the newest token (`sampling/rng.py`); -1 where a row has no distribution.
        self.sample: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = _optional(backends, "sample")
        # logprobs: (logits [R, V] float32, tokens [R] int64, k) -> [R, 1 + k] float32, of the token and the k best, and [R, 1 + k] int64,
        # how many logits rank before the token's and the ids of the best.
        self.logprobs: _Logprobs | None = _optional(backends, "logprobs")
        # likeliest: logits [S, V] float32 -> the lowest best ids [S] int64 and their probabilities [S] float32; -1 and NaN where a row has
        # no distribution.
        self.likeliest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = _optional(backends, "likeliest")
        # norm_pair: (a[T, H], its weight[H], b[T, H], its weight[H], eps) -> norm(a) | norm(b), [T, 2 H]: two `rms_norm`s side by side,
        # without the copies that would bring them there.
        self.norm_pair: _NormPair | None = _optional(backends, "norm_pair")
        # forbid: (logits [S, V] float32, bits [R, W] int32, rows [R] int64 or None: all) sets what has no bit to -inf.
        self.forbid: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = _optional(backends, "forbid")
        # Brings tensors to the host, see `fetch.py`; a backend that only plays a device has its own.
        self.fetch: Callable[..., Arrival] = _optional(backends, "fetch") or fetch
        logger.info("kernels: %s", ", ".join(f"{op}={name}" for op, name in self.chosen.items()))

    def check_kv_cache(self, name: str, head_dim: int, block_size: int) -> None:
        """Raises ConfigError if a chosen kernel can't write or read a KV cache of this format, with such heads and blocks."""
        for op in ("rotary_kv", "attention"):
            backend = next(b for b in self.backends if b.name == self.chosen[op])
            if name not in backend.kv_formats:
                raise ConfigError(
                    f"the {backend.name} backend's {op} doesn't know kv_cache_dtype {name}; use {', '.join(backend.kv_formats)}, "
                    f"or {backend.instead}"
                )
            reason = backend.reason_against_cache(head_dim, block_size)
            if reason is not None:
                raise ConfigError(f"the {backend.name} backend's {op} {reason}")

    def prepare(self, weight: torch.Tensor | PackedWeight) -> Weight:
        """Repacks a matrix for the first backend that takes it. Raises ModelLoadError with every reason for declining."""
        return self._prepare(weight)[0]

    def prepare_stack(self, parts: Sequence[torch.Tensor | PackedWeight]) -> Weight:
        """Repacks matrices over the same inputs, each as `prepare` would; their products become one output."""
        prepared = [self._prepare(part) for part in parts]
        weights, backend = [weight for weight, _ in prepared], prepared[0][1]
        if len(weights) == 1:
            return weights[0]
        return backend.stack(weights) if all(other is backend for _, other in prepared) else StackedWeight(weights)

    def prepare_experts(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> Experts:
        """Joins the experts of a layer, whose matrices this table has prepared. Raises ModelLoadError with every reason for declining."""
        reasons: list[str] = []
        for backend in self.backends:
            joined = backend.experts(gate_up, down)
            if isinstance(joined, Experts):
                op = "moe" if self.chosen.get("moe", backend.name) == backend.name else "moe[some layers]"
                if op not in self.chosen:
                    self.chosen[op] = backend.name
                    logger.info("kernels: %s=%s%s", op, backend.name, f" ({'; '.join(reasons)})" if reasons else "")
                return joined
            reasons.append(f"{backend.name}: {joined}")
        raise ModelLoadError(f"no kernel goes through these experts: {'; '.join(reasons)}")

    def prepare_lora(self, weights: LoraWeights) -> LoraWeights:
        """Repacks the adapters of a product for the backend that `lora` was chosen from."""
        return next(b for b in self.backends if b.name == self.chosen["lora"]).prepare_lora(weights)

    def _prepare(self, weight: torch.Tensor | PackedWeight) -> tuple[Weight, Backend]:
        reasons = []
        for backend in self.backends:
            prepared = backend.prepare(weight, self.dtype)
            if isinstance(prepared, Weight):
                self._note(weight, backend.name)
                return prepared, backend
            reasons.append(f"{backend.name}: {prepared}")
        if isinstance(weight, PackedWeight):
            self._note(weight, f"dequantised to {str(self.dtype).removeprefix('torch.')}")
            return self._prepare(weight.dequantize(self.dtype))
        raise ModelLoadError(f"no kernel multiplies by a {_kind(weight)} matrix {list(weight.shape)}: {'; '.join(reasons)}")

    def _note(self, weight: torch.Tensor | PackedWeight, how: str) -> None:
        op = f"linear[{_kind(weight)}]"
        if op not in self.chosen:
            self.chosen[op] = how
            logger.info("kernels: %s=%s", op, how)

    def linear(self, x: Rows, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x[T, K] -> x @ weight.T + bias, [T, N]."""
        if isinstance(x, RoundedRows):
            assert isinstance(weight, RoundingWeight), "rows are rounded for the matrix that multiplies them"
            return weight.linear_rounded(x, bias)
        return weight.linear(x, bias)

    def embedding(self, ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """ids[T] -> rows of weight[V, H], [T, H]."""
        return weight.embedding(ids)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, reader: Weight | None = None
    ) -> tuple[Rows, torch.Tensor]:
        """h = x + residual; returns (h / rms(h) * weight, h), both [T, H]. The mean of squares is over H, in float32.

        reader: the one matrix that will multiply the first, where nobody else reads it. A `RoundingWeight` gets it as `RoundedRows`.
        """
        if isinstance(reader, RoundingWeight):
            return reader.rms_norm(x, weight, eps, residual)
        return self._rms_norm(x, weight, eps, residual)  # type: ignore[attr-defined, no-any-return]

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
        """Rotates q[T, Hq, D] in place, half-split pairs (i, i + D/2), and stores k[T, Hk, D], rotated too, and v[T, Hk, D] into the
        slots[T] of one layer's cache. table[P, D] float32: cos | sin. k may be left rotated or as it was: nobody reads it again.

        norms: each head of q and k is normalised before it is rotated, head / rms(head) * weight[D].
        """
        self._rotary_kv(q, k, v, positions, table, cache, slots, norms)  # type: ignore[attr-defined]

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
        """Causal attention of q[T, Hq, D] over each request's own cached tokens; [T, Hq, D].

        Query i of a request stands at position seq_len - query_len + i and sees keys j <= that position, and with a window
        only those with position - j < window. Head h reads KV head h // (Hq / Hk). softcap: c * tanh(score / c).
        sinks[Hq] float32: a score of each head that joins its softmax's denominator and has no value (gpt-oss).
        """
        return self._attention(q, cache, batch, scale, window, softcap, sinks)  # type: ignore[attr-defined, no-any-return]

    def act_mul(self, x: torch.Tensor, kind: str, reader: Weight | None = None) -> Rows:
        """x[T, 2I] = gate | up -> act(gate) * up, [T, I]. kind: silu. reader: as of `rms_norm`."""
        if isinstance(reader, RoundingWeight):
            return reader.act_mul(x, kind)
        return self._act_mul(x, kind)  # type: ignore[attr-defined, no-any-return]

    def lora(self, y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> None:
        """Adds to y[T, N], in place, what each row's adapter makes of x[T, K]: scale * (x a^T) b, added up in float32."""
        self._lora(y, x, weights, rows)  # type: ignore[attr-defined]

    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        experts: Experts,
        top_k: int,
        renormalize: bool,
        kind: str,
        shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x[T, H] -> sum over each token's top_k experts e of share_e * down_e(act_mul(gate_up_e(x), kind)), [T, H].

        router_logits[T, E]: a token's experts are those with the highest, of equals those with the lower number. Shares are the softmax
        over all E, in float32, divided by the sum of the chosen ones where `renormalize`. shared: (y[T, H], gate[T, 1]), an expert that
        every token went through; sigmoid(gate) * y is added.
        """
        return experts.moe(x, router_logits, top_k, renormalize, kind, shared)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """logits[S, V] -> the lowest id with the highest value, [S] int64."""
        return self._argmax(logits)  # type: ignore[attr-defined, no-any-return]


def _optional(backends: Sequence[Backend], op: str) -> Any:
    return next((getattr(backend, op) for backend in backends if hasattr(backend, op)), None)


def _kind(weight: torch.Tensor | PackedWeight) -> str:
    if isinstance(weight, PackedWeight):
        return weight.scheme.name
    return str(weight.dtype).removeprefix("torch.")
