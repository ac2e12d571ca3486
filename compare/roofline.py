"""The least time a case can take on this machine, so that every figure can be shown as a share of what is possible.

Decode reads every weight and the KV of every sequence once a step: bytes over measured memory bandwidth. Prefill multiplies
every weight with every token: operations over the measured peak (bf16 for 16-bit weights, the fastest integer or bf16 rate
for smaller ones, since an engine may compute either way). A case's bound is the larger of the two. A share above 1 means
that something was measured wrong, and the report says so. KV is counted at 2 bytes an element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compare.workloads import Case

KV_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-like model that bytes and operations depend on. Weights are counted as elements."""

    layers: int
    hidden: int
    q_width: int
    kv_width: int
    vocab: int
    body: int  # all matrices but embedding and head
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        q, kv = heads * head_dim, int(config.get("num_key_value_heads", heads)) * head_dim
        layers, inner = int(config["num_hidden_layers"]), int(config["intermediate_size"])
        body = layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner)
        return cls(layers, hidden, q, kv, int(config["vocab_size"]), body, bool(config.get("tie_word_embeddings")))

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def weights_read(self, weight_bytes: float) -> float:
        """Bytes of weights that one step reads: all but an embedding table of its own, from which it takes single rows."""
        return weight_bytes if self.tied else weight_bytes * (1 - self.head / self.parameters)

    def kv_bytes(self, tokens: float) -> float:
        return 2.0 * self.layers * self.kv_width * KV_BYTES * tokens

    def operations(self, tokens: int, before: int = 0, logits: int = 1) -> float:
        """Multiply-adds, as two each, of computing `tokens` tokens behind `before` others and the logits of `logits` of them."""
        seen = tokens * before + tokens * (tokens + 1) / 2
        return 2.0 * self.body * tokens + 4.0 * self.layers * self.q_width * seen + 2.0 * self.head * logits


def bound(case: Case, shape: Shape, ceilings: Mapping[str, float], weight_bytes: float, precision: str) -> float | None:
    """The highest value of the case's own metric that this machine allows; None where there is no such bound."""
    bandwidth, peak = ceilings.get("read_bytes_per_s"), _peak(ceilings, precision)
    if not bandwidth or not peak or not case.requests:
        return None
    if case.metric == "prefill_tokens_per_s":
        tokens = sum(len(r.token_ids) for r in case.requests)
        work = sum(shape.operations(len(r.token_ids)) for r in case.requests)
        return tokens / max(work / peak, shape.weights_read(weight_bytes) / bandwidth)
    if case.metric == "decode_tokens_per_s":
        batch = min(case.concurrency, len(case.requests))
        contexts = sorted(len(r.token_ids) + r.max_tokens / 2 for r in case.requests)[:batch]
        bytes_read = shape.weights_read(weight_bytes) + shape.kv_bytes(sum(contexts))
        work = sum(shape.operations(1, int(c)) for c in contexts)
        return batch / max(bytes_read / bandwidth, work / peak)
    if case.metric == "output_tokens_per_s" and all(r.arrival == 0 for r in case.requests):
        return _whole_run(case, shape, bandwidth, peak, weight_bytes)
    return None


def _whole_run(case: Case, shape: Shape, bandwidth: float, peak: float, weight_bytes: float) -> float:
    """Output tokens a second when prompts and outputs both count: at least `max_tokens` steps for each wave of requests."""
    outputs = sum(r.max_tokens for r in case.requests)
    work = sum(
        shape.operations(len(r.token_ids)) + shape.operations(r.max_tokens - 1, len(r.token_ids), r.max_tokens - 1) for r in case.requests
    )
    steps = max(max(r.max_tokens for r in case.requests), outputs / case.concurrency)
    kv = sum(shape.kv_bytes(r.max_tokens * (len(r.token_ids) + r.max_tokens / 2)) for r in case.requests)
    return outputs / max(work / peak, (steps * shape.weights_read(weight_bytes) + kv) / bandwidth)


def _peak(ceilings: Mapping[str, float], precision: str) -> float | None:
    fp32, bf16, int8 = (ceilings.get(f"{kind}_ops_per_s") for kind in ("fp32", "bf16", "int8"))
    known: tuple[float | None, ...]
    if precision == "fp32":
        known = (fp32, bf16)[:1] if fp32 else (bf16,)
    elif precision in ("bf16", "fp16"):
        known = (bf16, fp32)
    else:
        known = (int8, bf16, fp32)
    return max((k for k in known if k), default=None)
