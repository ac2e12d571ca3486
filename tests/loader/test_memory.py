"""Peak memory of streaming: a consumer that copies sees its own copy grow by one tensor at a time, never the whole file beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

LAYERS, HIDDEN, FFN = 10, 512, 2048

# Reads every tensor, keeps nothing, and reports how far resident memory rose above where it was before. A fresh process, because
# an allocator that has run other tests has room that hides growth.
PROBE = """
import json, sys, torch
from pathlib import Path
from minfer.loader import ModelSource, open_checkpoint
torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
checkpoint = open_checkpoint(ModelSource(kind=sys.argv[1], name="m", path=Path(sys.argv[2])))
checkpoint.read("model.norm.weight").float().sum()
checkpoint.read("model.layers.0.mlp.up_proj.weight").to(torch.float64).sum()
base, peak, total = resident(), 0, 0
for name, tensor in checkpoint.tensors():
    tensor.to(torch.bfloat16 if tensor.dtype == torch.float32 else torch.float32).sum()
    peak, total = max(peak, resident()), total + tensor.nbytes
print(json.dumps({"rise": peak - base, "total": total}))
"""


def probe(kind: str, path: Path) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run([sys.executable, "-c", PROBE, kind, str(path)], capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("kind", ["folder", "gguf", "gguf-plain"])
def test_streaming_holds_one_tensor(tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    model = tiny(**shape, dtype=torch.float32 if kind == "gguf-plain" else torch.bfloat16)
    path = tmp_path
    if kind == "folder":
        model.save_pretrained(tmp_path)
    else:
        state: dict[str, Any] = {n: t.float().numpy() for n, t in model.state_dict().items()}
        if kind == "gguf":
            q8 = gguf.GGMLQuantizationType.Q8_0
            state = {n: (gguf.quants.quantize(t, q8), q8) if t.ndim == 2 else t for n, t in state.items()}
        keys = {"feed_forward_length": FFN}
        path = write_gguf(tmp_path / "m.gguf", state, heads=8, kv_heads=8, keys=keys)
    found = probe(kind.split("-")[0], path)
    largest = HIDDEN * FFN * 8  # fp32 and its copy, or the dequantised matrix and the blocks it came from
    assert found["total"] > 80 * 2**20 / (2 if kind == "folder" else 1)
    assert found["rise"] < largest + 16 * 2**20 < found["total"] / 1.5
