"""A whole step against the sum of its kernels, from the families' predictions: what stands between the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minfer.kernels.triton.cost.devices import DEVICES

MODEL, LAYERS, HIDDEN, VOCAB = "llama3.1-8b", 32, 4096, 128256
SMALL = 4  # launches a layer: two norms, rotary_kv, act_mul
WIDTHS = {"int4": 0.53125, "fp8 x fp8": 1.0}  # bytes a weight
MATRICES = 6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336  # weights of a layer
KV_BYTES = 2 * 8 * 128 * 2  # a token and layer


def step_table(results: Mapping[str, Any]) -> list[str]:
    """Lines of the page; none where a family hasn't been predicted."""
    if not {"linear", "attention"} <= results.keys():
        return []
    lines = [
        "### The step and the sum of its kernels, predicted",
        "",
        f"{MODEL}, {LAYERS} layers, every request at 4096 tokens, microseconds a step. *products* and *attention* are predicted above; "
        "the small ops are counted as launches, the output matrix (bf16) as bytes over bandwidth. *floor*: all bytes of weights and KV "
        "at the device's read bandwidth. What stands between is launches first: the host, sampling and gaps between kernels aren't in it.",
        "",
        "| on | matrices | requests | products | of that launches | attention | small ops | output matrix | sum | floor | share |",
        "|" + "---|" * 11,
    ]
    for device in ("H100 SXM", "H200 SXM"):
        for kind, width in WIDTHS.items():
            lines += [_row(results, device, kind, width, requests) for requests in (1, 64)]
    return [*lines, ""]


def _row(results: Mapping[str, Any], device: str, kind: str, width: float, requests: int) -> str:
    products = _case(results["linear"], f"{MODEL}, {kind}, {requests} row{'s' * (requests > 1)}", device)
    attention = LAYERS * float(_case(results["attention"], f"decode, {requests} x 4096", device)["predicted_us"])
    machine = DEVICES[device]
    linear = LAYERS * float(products["predicted_us"])
    launches = LAYERS * len(products["launches"]) * machine.launch * 1e6
    small = LAYERS * SMALL * machine.launch * 1e6
    head = 2 * HIDDEN * VOCAB / machine.read_bandwidth * 1e6
    moved = LAYERS * (MATRICES * width + requests * 4096 * KV_BYTES) + 2 * HIDDEN * VOCAB
    total, floor = linear + attention + small + head, moved / machine.read_bandwidth * 1e6
    cells = (linear, launches, attention, small, head, total, floor)
    return f"| {device} | {kind} | {requests} | " + " | ".join(f"{value:.0f}" for value in cells) + f" | {floor / total:.0%} |"


def _case(result: Any, name: str, device: str) -> Any:
    return next(row for row in result["cases"] if (row["case"], row["device"]) == (name, device))
