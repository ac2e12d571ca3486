"""The compiled CPU backend: the ops of the table as calls into the library, and matrices repacked for its products.

Each method checks what the kernel takes for granted (types, strides), takes its output from the runtime and makes one
call. What it leaves out: anything but float32, bfloat16 and float16 activations, which the reference backend serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch

from minfer.batch import Batch, LoraRows
from minfer.errors import ConfigError
from minfer.kernels.cpu.experts import CpuExperts
from minfer.kernels.cpu.runtime import DTYPES, Runtime
from minfer.kernels.cpu.weights import Activation, CpuStackedWeight, LinearKernels
from minfer.kernels.lora import LoraWeights
from minfer.kernels.ops import Backend, Experts, HeadNorms, Weight
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 1024  # kMaxHeadDim in kv_codes.h
_LORA_PANEL = 64  # kPanel in lora.cpp


class CpuBackend(Backend):
    """Owns its thread pool. Raises LibraryMissingError where the kernels were not built."""

    name = "cpu"

    def __init__(self, threads: int | None = None, isa: str | None = None, activation: Activation = "int8") -> None:
        self.runtime = runtime = Runtime(threads, isa)
        self.linear_kernels = LinearKernels(runtime, activation)
        self._rms_norm = runtime.op(
            "rms_norm",
            "ptr x, ptr residual, ptr weight, ptr out, ptr sum, int rows, int width, int x_stride, int residual_stride, int out_stride, "
            "int dtype, int weight_dtype, double eps",
        )
        self._qk_norm = runtime.op(
            "qk_norm",
            "ptr q, ptr k, ptr q_weight, ptr k_weight, int rows, int q_heads, int k_heads, int dim, int q_stride, int k_stride, int dtype, "
            "int weight_dtype, double eps",
        )
        self._rotary = runtime.op(
            "rotary",
            "ptr q, ptr k, ptr positions, ptr table, int rows, int q_heads, int k_heads, int dim, int q_stride, int k_stride, int dtype",
        )
        self._write_kv = runtime.op(
            "write_kv",
            "ptr k, ptr v, ptr k_cache, ptr v_cache, ptr k_scale, ptr v_scale, ptr slots, int rows, int heads, int dim, int block_size, "
            "int k_stride, int v_stride, int dtype, int cache_dtype",
        )
        self._attention = runtime.op(
            "attention",
            "ptr q, ptr k_cache, ptr v_cache, ptr k_scale, ptr v_scale, ptr out, ptr query_start, ptr seq_lens, ptr block_tables, "
            "ptr tails, ptr sinks, int requests, int heads, int kv_heads, int dim, int block_size, int q_stride, int table_stride, "
            "int tail_stride, int dtype, int cache_dtype, int window, double scale, double softcap",
        )
        self._silu_mul = runtime.op("silu_mul", "ptr x, ptr out, int rows, int width, int x_stride, int dtype")
        self._argmax = runtime.op("argmax", "ptr x, ptr out, int rows, int width, int x_stride, int dtype")
        self._lora_shrink = runtime.op(
            "lora_shrink",
            "ptr x, ptr index, ptr tiles, ptr a, ptr ranks, ptr t, int lora_tiles, int width, int x_stride, int parts, int rank, int dtype",
        )
        self._lora_expand = runtime.op(
            "lora_expand",
            "ptr t, ptr index, ptr tiles, ptr b, ptr scales, ptr ranks, ptr bounds, ptr y, int lora_tiles, int parts, int rank, "
            "int y_stride, int dtype",
        )
        self._sample = runtime.op(
            "sample", "ptr logits, ptr wishes, ptr positions, ptr out, int rows, int width, int x_stride, int position_dtype"
        )
        self._likeliest = runtime.op("likeliest", "ptr logits, ptr tokens, ptr chances, int rows, int width, int x_stride")

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        return self.linear_kernels.prepare(weight, dtype)

    def prepare_lora(self, weights: LoraWeights) -> LoraWeights:
        """b as [adapters, panels, R, 64]: the columns of each part in panels of 64, the last filled up with zeros (lora.cpp).

        Both lie among the other weights, in huge pages: of small ones each product would touch dozens.
        """
        arena = self.linear_kernels.arena
        panels = []
        for begin, end in pairwise(weights.columns):
            own = torch.nn.functional.pad(weights.b[:, :, begin:end], (0, (begin - end) % _LORA_PANEL))
            panels.append(own.unflatten(2, (-1, _LORA_PANEL)).transpose(1, 2))
        a, b = (arena.empty(t.numel(), t.dtype).view(t.shape).copy_(t) for t in (weights.a, torch.cat(panels, 1)))
        return dataclasses.replace(weights, a=a, b=b)

    def stack(self, parts: Sequence[Weight]) -> Weight:
        return CpuStackedWeight(self.runtime, parts)

    def experts(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> Experts | str:
        return CpuExperts.reason_against(gate_up, down) or CpuExperts(self.runtime, gate_up, down)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = x.shape
        runtime, stride = self.runtime, _row_stride(x, "x")
        out = runtime.empty((rows, width), x.dtype)
        total = x
        if residual is not None:
            _same_type("residual", residual, x)
            total = runtime.empty((rows, width), x.dtype)
        residual_stride = 0 if residual is None else _row_stride(residual, "residual")
        pointers = (runtime.ptr(x), runtime.ptr(residual), runtime.ptr(weight), runtime.ptr(out), runtime.ptr(total))
        self._rms_norm(*pointers, rows, width, stride, residual_stride, width, _code(x), _code(weight), eps)
        return out, total

    def norm_pair(self, a: torch.Tensor, a_weight: torch.Tensor, b: torch.Tensor, b_weight: torch.Tensor, eps: float) -> torch.Tensor:
        _same_type("b", b, a)
        (rows, width), ptr = a.shape, self.runtime.ptr
        if b.shape != a.shape:
            raise ConfigError(f"a pair of norms takes two tensors of one shape, not {list(a.shape)} and {list(b.shape)}")
        out = self.runtime.empty((rows, 2 * width), a.dtype)
        for x, weight, half in ((a, a_weight, out[:, :width]), (b, b_weight, out[:, width:])):
            pointers = (ptr(x), 0, ptr(weight), ptr(half), 0)
            self._rms_norm(*pointers, rows, width, _row_stride(x, "x"), 0, 2 * width, _code(x), _code(weight), eps)
        return out

    def qk_norm(self, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
        _same_type("k", k, q)
        (rows, q_heads, dim), k_heads, ptr = q.shape, k.shape[1], self.runtime.ptr
        if q_weight.shape != (dim,) or k_weight.shape != (dim,) or q_weight.dtype != k_weight.dtype:
            raise ConfigError(f"the weights of q's and k's norms must be [{dim}] of one type, not {q_weight.shape} and {k_weight.shape}")
        sizes = (rows, q_heads, k_heads, dim, _row_stride(q, "q"), _row_stride(k, "k"))
        self._qk_norm(ptr(q), ptr(k), ptr(q_weight), ptr(k_weight), *sizes, _code(q), _code(q_weight), eps)

    def rotary(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
        _same_type("k", k, q)
        _index("positions", positions, torch.int32)
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise ConfigError(f"the rotary table must be contiguous float32, not {table.dtype}")
        (rows, q_heads, dim), k_heads = q.shape, k.shape[1]
        ptr = self.runtime.ptr
        strides = (_row_stride(q, "q"), _row_stride(k, "k"))
        self._rotary(ptr(q), ptr(k), ptr(positions), ptr(table), rows, q_heads, k_heads, dim, *strides, _code(q))

    def write_kv(self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        _same_type("v", v, k)
        _index("slots", slots, torch.int64)
        rows, heads, dim = k.shape
        _head_dim(dim)
        ptr = self.runtime.ptr
        pointers = (ptr(k), ptr(v), *map(ptr, (cache.k, cache.v, cache.k_scale, cache.v_scale)), ptr(slots))
        strides = (_row_stride(k, "k"), _row_stride(v, "v"))
        self._write_kv(*pointers, rows, heads, dim, cache.block_size, *strides, _code(k), DTYPES[cache.format.dtype])

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
        if norms is not None:
            self.qk_norm(q, k, *norms)
        self.rotary(q, k, positions, table)
        self.write_kv(k, v, cache, slots)

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
        rows, heads, dim = q.shape
        _head_dim(dim)
        for name in ("query_start", "seq_lens", "block_tables"):
            _index(name, getattr(batch, name), torch.int32)
        runtime, ptr = self.runtime, self.runtime.ptr
        out = runtime.empty((rows, heads, dim), q.dtype)
        pages = map(ptr, (cache.k, cache.v, cache.k_scale, cache.v_scale))
        if batch.tails is not None:
            _index("tails", batch.tails, torch.int64)
        if sinks is not None and (sinks.dtype != torch.float32 or tuple(sinks.shape) != (heads,) or not sinks.is_contiguous()):
            raise ConfigError(f"sinks must be contiguous torch.float32 [{heads}], not {sinks.dtype} {list(sinks.shape)}")
        indices = map(ptr, (batch.query_start, batch.seq_lens, batch.block_tables, batch.tails))
        pointers = (ptr(q), *pages, ptr(out), *indices, ptr(sinks))
        sizes = (batch.num_requests, heads, cache.kv_heads, dim, cache.block_size)
        strides = (_row_stride(q, "q"), batch.block_tables.stride(0), 0 if batch.tails is None else batch.tails.stride(0))
        self._attention(*pointers, *sizes, *strides, _code(q), DTYPES[cache.format.dtype], window or 0, scale, softcap or 0.0)
        return out

    def act_mul(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind != "silu":
            raise ConfigError(f"the cpu backend's act_mul knows silu, not {kind!r}")
        rows, width = x.shape[0], x.shape[1] // 2
        out = self.runtime.empty((rows, width), x.dtype)
        self._silu_mul(self.runtime.ptr(x), self.runtime.ptr(out), rows, width, _row_stride(x, "x"), _code(x))
        return out

    def lora(self, y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> None:
        for name, tensor in (("y", y), ("the adapters' a", weights.a), ("the adapters' b", weights.b)):
            _same_type(name, tensor, x)
        _index("rows", rows.rows, torch.int32)
        _index("tiles", rows.tiles, torch.int32)
        width, columns = weights.a.shape[2], weights.columns[-1]
        if x.shape[1:] != (width,) or y.shape != (x.shape[0], columns):
            raise ConfigError(f"these adapters add [T, {columns}] made of [T, {width}], not {list(y.shape)} of {list(x.shape)}")
        runtime, ptr, tiles, sizes = self.runtime, self.runtime.ptr, rows.tiles.shape[0], (weights.parts, weights.rank)
        t = runtime.empty((x.shape[0], weights.parts * weights.rank), torch.float32)
        index = (ptr(rows.rows), ptr(rows.tiles))
        self._lora_shrink(ptr(x), *index, ptr(weights.a), ptr(weights.ranks), ptr(t), tiles, width, _row_stride(x, "x"), *sizes, _code(x))
        of_parts = map(ptr, (weights.scales, weights.ranks, weights.bounds))
        self._lora_expand(ptr(t), *index, ptr(weights.b), *of_parts, ptr(y), tiles, *sizes, _row_stride(y, "y"), _code(y))

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        rows, width = logits.shape
        out = self.runtime.empty((rows,), torch.int64)
        self._argmax(self.runtime.ptr(logits), self.runtime.ptr(out), rows, width, _row_stride(logits, "logits"), _code(logits))
        return out

    def sample(self, logits: torch.Tensor, wishes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows, width = logits.shape
        if logits.dtype != torch.float32 or wishes.dtype != torch.float64 or wishes.shape != (rows, 6) or not wishes.is_contiguous():
            raise ConfigError(f"sample takes float32 logits and float64 wishes [{rows}, 6], not {logits.dtype} and {list(wishes.shape)}")
        if positions.dtype not in (torch.int32, torch.int64) or positions.shape != (rows,) or not positions.is_contiguous():
            raise ConfigError(f"positions must be contiguous int32 or int64 [{rows}], not {positions.dtype} {list(positions.shape)}")
        out = self.runtime.empty((rows,), torch.int64)
        pointers = map(self.runtime.ptr, (logits, wishes, positions, out))
        self._sample(*pointers, rows, width, _row_stride(logits, "logits"), DTYPES[positions.dtype])
        return out

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = logits.shape
        if logits.dtype != torch.float32:
            raise ConfigError(f"likeliest takes float32 logits, not {logits.dtype}")
        tokens, chances = self.runtime.empty((rows,), torch.int64), self.runtime.empty((rows,), torch.float32)
        self._likeliest(*map(self.runtime.ptr, (logits, tokens, chances)), rows, width, _row_stride(logits, "logits"))
        return tokens, chances


def _code(tensor: torch.Tensor) -> int:
    """The number that the kernels know the tensor's type by."""
    if tensor.dtype not in FLOATS:
        raise ConfigError(f"the cpu backend computes in float32, bfloat16 and float16, not {tensor.dtype}")
    return DTYPES[tensor.dtype]


def _head_dim(dim: int) -> None:
    if dim > _MAX_HEAD_DIM or dim % 2:
        raise ConfigError(f"the cpu backend's attention takes an even head_dim up to {_MAX_HEAD_DIM}, not {dim}")


def _row_stride(tensor: torch.Tensor, name: str) -> int:
    """Elements between rows, after checking that everything within a row is contiguous."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if stride != expected and size != 1:
            raise ConfigError(f"{name} must be contiguous but for its first axis, not {list(tensor.shape)} by {list(tensor.stride())}")
        expected *= size
    return tensor.stride(0)


def _same_type(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise ConfigError(f"{name} must be {like.dtype} as its companion is, not {tensor.dtype}")


def _index(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.stride(-1) != 1:
        raise ConfigError(f"{name} must be contiguous {dtype}, not {tensor.dtype}")
