"""FlashAttention-2 (Dao 2023), the library, behind the attention op: `--attention-backend flash_attn`.

It reads the same paged cache as our kernels do. It wants [num_blocks, block_size, kv_heads, head_dim] where we keep the heads of a block
before its tokens, but takes any strides above the last axis, so a transposed view is all there is between the two: no bytes are copied.

    every request brings as many tokens     flash_attn_with_kvcache     lengths as they are; splits the context where rows are few
    any other step                          flash_attn_varlen_func      lengths as running sums

Its rules, of version 2.6 on: blocks of a multiple of 256 tokens, heads of up to 256 values in steps of 8, float16 or bfloat16 with the
cache in the same type, an NVIDIA GPU from Ampere on. What a user chose is held against them when the engine is built. A window of n
tokens, the query's own among them, is n - 1 to the left of it.

Steps of one token each are replayed from CUDA graphs: lengths and tables are read on the device, and how finely the context is split
follows from the width of the tables, which in a graph's is that of the longest sequence. Its authors say that the call may be captured
(flash-attention's issue 896). Steps with drafts run as they come, since the other call's grid follows from lengths on the host.

Where there is no GPU, what is proven is that these arguments mean what the reference computes: a stand-in with the published signatures
(`tests/kernels/flash_attn_standin.py`) takes them literally.

Left out: sinks and drafts that branch, which it has no arguments for; reading a shared prefix once; FlashAttention-3, a package of another
name that takes blocks of any size; AMD's port. No extra of ours names the package, because it has to be built for the torch that
it meets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.ops import Backend, Weight
from minfer.kvcache import LayerCache, format_of
from minfer.quant import PackedWeight

BLOCK_SIZES = "256, 512 or 1024"  # what EngineConfig allows of the multiples of 256
_MAX_HEAD_DIM = 256


class FlashAttnBackend(Backend):
    """The attention op, and nothing else."""

    name = "flash_attn"
    instead = "--attention-backend auto"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ConfigError where the library can't run."""
        if dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"attention_backend flash_attn computes in float16 or bfloat16, not {dtype}; use {self.instead}")
        if (reason := unfit(device)) is not None:
            raise ConfigError(f"attention_backend flash_attn needs an NVIDIA GPU from Ampere on, not {reason}; use {self.instead}")
        try:
            from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
        except ImportError as error:
            raise ConfigError(f"attention_backend flash_attn needs the flash_attn package: pip install flash-attn ({error})") from error
        self.kv_formats = (format_of(dtype).name,)
        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        return "only attends"

    def reason_against_cache(self, head_dim: int, block_size: int) -> str | None:
        if block_size % 256:
            return f"reads blocks of {BLOCK_SIZES} tokens, not {block_size}: set --block-size"
        if head_dim > _MAX_HEAD_DIM or head_dim % 8:
            return f"takes heads of up to {_MAX_HEAD_DIM} values, a multiple of 8, not {head_dim}; use {self.instead}"
        return None

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
        if sinks is not None:
            raise ConfigError(f"flash_attn has no sinks, which this model's attention needs; use {self.instead}")
        if batch.tails is not None:
            raise ConfigError(f"flash_attn can't verify drafts that branch; use {self.instead}, or draft_top_k 1")
        if not q.shape[0]:
            return torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)  # [num_blocks, block_size, Hk, D], views
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "block_table": batch.block_tables}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if softcap is not None:
            options["softcap"] = softcap
        longest = max(batch.query_lens_host)
        if longest == min(batch.query_lens_host):
            rows = q.unflatten(0, (batch.num_requests, longest))  # [R, n, Hq, D]
            out: torch.Tensor = self._with_kvcache(rows, k, v, cache_seqlens=batch.seq_lens, **options)
            return out.flatten(0, 1)
        ends = F.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        # Of at most one token a request it would take there to be exactly one; an upper bound is all it asks for.
        bounds = {"max_seqlen_q": max(2, longest), "max_seqlen_k": max(batch.seq_lens_host)}
        ragged: torch.Tensor = self._varlen(q, k, v, cu_seqlens_q=batch.query_start, cu_seqlens_k=ends, **bounds, **options)
        return ragged


def unfit(device: torch.device) -> str | None:
    """What the device is, if not one that the library runs on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"device {device.type}" if device.type != "cuda" else "an AMD one"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}"
