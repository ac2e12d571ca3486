"""Attention: its calls at serving shapes, and how much work each launch has.

A case is `requests` that bring `new` tokens each, of `total` in all; llama3.1-8b's heads unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.batch import Batch
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import Launch
from minfer.kernels.triton.aot_cases import DTYPE, META, meta
from minfer.kernels.triton.cost.family import Case, Change, Check, Family
from minfer.kernels.triton.cost.predict import Work
from minfer.kvcache import LayerCache, format_of

_BLOCK = 16
_ALL = ("H100 SXM", "H200 SXM", "MI300X")


def case(
    name: str, requests: int, new: int, total: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, stored: torch.dtype = DTYPE,
    window: int | None = None, devices: Sequence[str] = _ALL,
) -> Case:  # fmt: skip
    row = 2 * format_of(stored).row_bytes(dim)  # of K and V, with their scales
    seen = requests * sum(min(total - new + i + 1, window or total) for i in range(new))
    reach = total if window is None else min(total, window + new)
    q = 2 * requests * new * heads * dim

    def call(backend: TritonBackend) -> None:
        start, lens, table = (meta(*shape, dtype=torch.int32) for shape in ((requests + 1,), (requests,), (requests, -(-total // _BLOCK))))
        none = meta(0, dtype=torch.int32)
        batch = Batch(none, none, none, start, lens, table, none, [new] * requests, [total] * requests)
        cache = LayerCache.empty(1 << 15, kv_heads, _BLOCK, dim, stored, META)
        rows = meta(requests * new, heads + 2 * kv_heads, dim)[:, :heads]
        backend.attention(rows, cache, batch, dim**-0.5, window)

    def work(kernel: str, launch: Launch) -> Work:
        if kernel == "merge_kernel":
            return Work([()] * (requests * new * heads), q, cold=0.0)  # the partial results were written a moment ago: L2 has them
        if kernel == "rotate_kernel":
            return Work([()] * (launch.grid[0] * launch.grid[1]), 2 * q, cold=0.0)
        turns = _turns(requests, new, total, kv_heads, window, launch)
        loaded = row * launch.constants["TILE"] * sum(map(sum, turns))
        stored_bytes = requests * reach * kv_heads * row
        return Work(turns, stored_bytes + 2 * q, min(1.0, stored_bytes / loaded), 4 * seen * heads * dim, searches=requests.bit_length())

    return Case(name, call, work, requests * reach * kv_heads * row + 2 * q, 4 * seen * heads * dim, devices=devices)


def _turns(requests: int, new: int, total: int, kv_heads: int, window: int | None, launch: Launch) -> list[tuple[int, ...]]:
    """Of each program with work, in the grid's order: tiles without a mask and tiles with one. As `attention_kernel` cuts them."""
    size = launch.constants
    tokens, tile, splits = size["BLOCK_M"] // size["GROUP"], size["TILE"], size["SPLITS"]
    programs: list[tuple[int, ...]] = []
    for split in range(splits):
        of_request: list[tuple[int, ...]] = []
        for first in range(0, new, tokens):
            position = total - new + first
            begin, end = 0, (min(position + tokens, total) - 1) // tile + 1
            if window is not None:
                begin = max(position - window + 1, 0) // tile
            share = -(-(end - begin) // splits)
            begin += split * share
            end = min(begin + share, end)
            bulk = begin if window is not None else max(min((position + 1) // tile, end), begin)
            of_request.append((max(0, bulk - begin), max(0, end - bulk)))
        programs += of_request * (requests * kv_heads)
    return programs


_FLASH = ("A100 SXM 80 GB",)
_PROMPT = "prompt, 2 x 8192, 16 KV heads"
_OPERATIONS = 4 * 2 * 8192 * 8193 // 2 * 16 * 128  # of that, causal
_AZURE = "Azure's AI benchmarking guide: FlashAttention-2, batch 2, 8192 tokens, heads of 128: 328 and 329 TFLOP/s"
_PAPER = "FlashAttention-2 (arXiv:2307.08691): up to 230 TFLOP/s, and 1.3 to 2.5 times as fast as a Triton kernel"
_DECODING = "Flash-Decoding (PyTorch blog, October 2023): 16 query heads, 2 KV heads of 128, float16"

FAMILY = Family(
    "attention",
    "Attention",
    [
        case("decode, 1 x 4096", 1, 1, 4096),
        case("decode, 1 x 32768", 1, 1, 32768),
        case("decode, 8 x 4096", 8, 1, 4096),
        case("decode, 64 x 1024", 64, 1, 1024),
        case("decode, 64 x 4096", 64, 1, 4096),
        case("decode, 256 x 1024", 256, 1, 1024),
        case("decode, 64 x 4096, 32 KV heads (llama2-7b)", 64, 1, 4096, kv_heads=32),
        case("decode, 64 x 1024, smollm2", 64, 1, 1024, heads=9, kv_heads=3, dim=64),
        case("decode, 64 x 4096, int8 cache", 64, 1, 4096, stored=torch.int8),
        case("decode, 64 x 4096, int4 cache", 64, 1, 4096, stored=torch.uint8),
        case("decode, 64 x 4096, fp8 cache", 64, 1, 4096, stored=torch.float8_e4m3fn),
        case("decode, 1 x 32768, int8 cache", 1, 1, 32768, stored=torch.int8),
        case("decode, 1 x 32768, int4 cache", 1, 1, 32768, stored=torch.uint8),
        case("drafts, 8 x 5 new of 4096", 8, 5, 4096),
        case("drafts, 1 x 5 new of 16384", 1, 5, 16384),
        case("drafts, 8 x 5 new of 16384", 8, 5, 16384),
        case("drafts, 8 x 5 new of 16384, int8 cache", 8, 5, 16384, stored=torch.int8),
        case("chunk, 1 x 64 new of 16384", 1, 64, 16384),
        case("chunk, 1 x 512 new of 8192", 1, 512, 8192),
        case("chunk, 1 x 512 new of 8192, int8 cache", 1, 512, 8192, stored=torch.int8),
        case("prompt, 4 x 2048", 4, 2048, 2048),
        case("prompt, 1 x 8192", 1, 8192, 8192),
        case("prompt, 1 x 8192, window of 4096", 1, 8192, 8192, window=4096),
        case(_PROMPT, 2, 8192, 8192, 16, 16, devices=("A100 SXM 80 GB", "H100 SXM", "H200 SXM")),
        *(
            case(f"decode, {n} x {total}, 16 heads, 2 KV heads", n, 1, total, 16, 2, devices=_FLASH)
            for n, total in ((32, 2048), (8, 8192), (1, 65536), (1, 131072))
        ),
    ],
    checks=[
        *(
            Check(f"decode, {n} x {total}, 16 heads, 2 KV heads", "A100 SXM 80 GB", time, _DECODING, 0.6, 1.6)
            for n, total, time in ((32, 2048, 58.5), (8, 8192, 56.4), (1, 65536, 64.4), (1, 131072, 106.6))
        ),
        Check(_PROMPT, "A100 SXM 80 GB", _OPERATIONS / 230e6, _PAPER, 1.0, 3.0),
        Check(_PROMPT, "H100 SXM", _OPERATIONS / 327.9e6, _AZURE, 0.5, 1.6),
        Check(_PROMPT, "H200 SXM", _OPERATIONS / 329.3e6, _AZURE, 0.5, 1.6),
    ],
    changes=[
        Change(
            "Four programs a processor where a context is split on NVIDIA, not two",
            "Two leave the memory idle while they wait for a gather, a copy, and eight barriers a turn; the registers have room for five.",
            [("decode, 1 x 32768", "H100 SXM"), ("decode, 1 x 32768", "H200 SXM"), ("decode, 8 x 4096", "H100 SXM")],
        ),
        Change(
            "Prompts in tiles of 128 rows and 64 keys, eight warps and three stages on Hopper; elsewhere they spill, or don't fit",
            "With 64 rows K and V come from L2 twice as often, with 32 keys the addresses of a turn weigh twice as much.",
            [("prompt, 1 x 8192", "H100 SXM"), ("prompt, 4 x 2048", "H100 SXM"), (_PROMPT, "H100 SXM")],
        ),
        Change(
            "Drafts to verify, and short chunks of long prompts, split the context too",
            "Their tiles are wide, and each walked all of the context: few requests kept few processors busy. As many programs are "
            "made as run at once, by their registers three of 64 rows a processor on NVIDIA, two of codes and on AMD, one of 128 rows.",
            [
                *(
                    (name, device)
                    for name in ("drafts, 1 x 5 new of 16384", "drafts, 8 x 5 new of 16384", "chunk, 1 x 64 new of 16384")
                    for device in ("H100 SXM", "MI300X")
                ),
                ("drafts, 8 x 5 new of 16384, int8 cache", "H100 SXM"),
                ("chunk, 1 x 512 new of 8192", "MI300X"),
            ],
        ),
    ],
    first=[
        "`decode, 64 x 4096` and `decode, 1 x 32768` in bfloat16: whether the model's bandwidth and its latencies hold. If the first is "
        "slower than predicted, the read bandwidth is wrong; if only the second, what a turn waits for is.",
        "`decode, 64 x 4096, int8 cache` beside bfloat16's. It is predicted to wait for itself, not for the memory: the barriers of a "
        "reduction over four warps, and V read from shared memory byte by byte. If so, codes should become numbers before they go there.",
        "`prompt, 1 x 8192` with tiles of 128 x 64 and of 64 x 32 (`attention._tiles`): the gain rests on an assumed bandwidth of L2.",
        "`decode, 1 x 4096` and `1 x 32768` with two, four and eight programs a processor (`attention._splits`), the merge included.",
        "On MI300X the quantised caches: predicted to be bound by the vector pipe, several times off the memory. Their listing reads codes "
        "from LDS a byte at a time.",
        "What a kernel of a captured graph adds when nothing else is to be done (`launch` in `cost/devices.py`): a step of llama3.1-8b has "
        "some three hundred.",
        "`drafts, 1 x 5 new of 16384` and `8 x 5`: verification is the kernel of every speculative step. Two, three and four programs a "
        "processor (`attention._wide_splits`): predicted are 37, 32 and 42 us for the first on H100.",
    ],
)
