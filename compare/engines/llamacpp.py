"""llama.cpp through llama-cpp-python's low-level C API: its `Llama` class adds a Python sampler that costs a third of the speed.

Continuous batching here is this adapter's own loop over `llama_decode`, as llama.cpp's server has it: prompts first, in
batches of up to 2,048 tokens, then one token for every running sequence. Flash attention on, one KV stream per sequence
(`kv_unified=False`), F16 KV. Tried against this and slower on two cores of a Zen 4: no flash attention (a prompt of 512 tokens
at 842 instead of 1,325 tokens/s), a Q8_0 cache, batches of 512, one prompt a call. With prefix caching on, a finished sequence
keeps its KV and the next request whose prompt begins the same way starts from it, as `cache_prompt` does in the server.
Setting: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md (`-fa on`, `-t` = cores).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, finished, run_steps
from compare.gguf_export import RANDOM, write_gguf, write_or_share_gguf
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="llamacpp",
    title="llama.cpp",
    url="https://github.com/abetlen/llama-cpp-python",
    setting="C API of llama-cpp-python, flash attention on, one KV stream per sequence, batches of 2,048 tokens; built natively",
    precisions={
        "cpu": ("bf16", "fp16", "int8", "int4", "q4_1", "q4_k_m"),
        "cuda": ("bf16", "fp16", "int8", "int4", "q4_1", "q4_k_m"),
    },
    batching="continuous",
    scores=True,
    prefix_caching=True,
    install={
        "cpu": (Install(("llama-cpp-python==0.3.36", "numpy", "gguf==0.19.0")),),
        "cuda": (Install(("llama-cpp-python==0.3.36", "numpy", "gguf==0.19.0"), env=(("CMAKE_ARGS", "-DGGML_CUDA=on"),)),),
    },
    modules=("llama_cpp", "gguf"),
    adapter="LlamaCpp",
)

BATCH_TOKENS = 2048
MICRO_BATCH = 512
_SIMPLE_TYPES = ("Q8_0", "Q4_0", "Q4_1")  # what the gguf package writes too
_FILE_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "q4_1": "Q4_1", "q4_k_m": "Q4_K_M"}


@dataclass
class Slot:
    """One KV stream: the tokens whose KV it holds, and the request it serves (None: free, its KV kept for reuse)."""

    kept: list[int] = field(default_factory=list)
    index: int | None = None
    todo: list[int] = field(default_factory=list)  # prompt tokens not yet computed, or the one token just sampled
    count: int = 0


class LlamaCpp(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        import llama_cpp

        shipped = weights / "source.gguf"
        if precision == "q4_1" and shipped.exists():  # the file the weights came from: the same bits, no second rounding
            (out / "model.gguf").symlink_to(shipped.resolve())
            return
        if (weights / RANDOM).exists() and _FILE_TYPES.get(precision) in _SIMPLE_TYPES:
            write_or_share_gguf(weights, out / "model.gguf", _FILE_TYPES[precision])
            return
        if precision in ("bf16", "fp16"):
            write_gguf(weights, out / "model.gguf", "BF16" if precision == "bf16" else "F16")
            return
        write_gguf(weights, out / "full.gguf", "BF16")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{_FILE_TYPES[precision]}")
        code = llama_cpp.llama_model_quantize(str(out / "full.gguf").encode(), str(out / "model.gguf").encode(), params)
        (out / "full.gguf").unlink()
        if code:
            raise RuntimeError(f"llama_model_quantize failed with code {code}")

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import llama_cpp
        import numpy as np

        self.api, self.np, self.options = llama_cpp, np, options
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 999 if options.device == "cuda" else 0
        self.model = llama_cpp.llama_model_load_from_file(str(model / "model.gguf").encode(), model_params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the file; its log says why")
        self.slots = [Slot() for _ in range(options.max_concurrency)]
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = options.max_concurrency
        params.n_ctx = options.max_context * options.max_concurrency
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context; its log says why")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)) or options.vocab_size
        info = llama_cpp.llama_print_system_info().decode()
        return {"version": f"llama-cpp-python {llama_cpp.__version__}", "flags": f"flash_attn on, kv_unified off, {info.strip()}"}

    def generate(self, recorder: Recorder) -> None:
        waiting: list[int] = []
        stop_at = self.options

        def add(index: int, request: Request) -> None:
            waiting.append(index)
            self._admit(recorder, waiting)

        def step() -> bool:
            for slot, logits in self._compute():
                token = int(logits.argmax())
                assert slot.index is not None
                recorder.token(slot.index, token)
                slot.count += 1
                if finished(recorder.requests[slot.index], stop_at, token, slot.count):
                    self._release(slot)
                else:
                    slot.todo = [token]
            self._admit(recorder, waiting)
            return any(s.index is not None for s in self.slots)

        run_steps(recorder, add, step)

    def _admit(self, recorder: Recorder, waiting: list[int]) -> None:
        """Gives waiting requests to free slots, preferring a slot whose kept KV begins the same way."""
        while waiting and any(s.index is None for s in self.slots):
            index = waiting.pop(0)
            prompt = recorder.requests[index].token_ids
            free = [s for s in self.slots if s.index is None]
            slot = max(free, key=lambda s: _common(s.kept, prompt)) if self.options.prefix_caching else free[0]
            kept = self._reuse(slot, prompt) if self.options.prefix_caching else self._forget(slot)
            slot.index, slot.count, slot.kept, slot.todo = index, 0, prompt[:kept], prompt[kept:]

    def _reuse(self, slot: Slot, prompt: list[int]) -> int:
        """Keeps or copies the longest known beginning of `prompt` into `slot`; returns its length (at least one token is left)."""
        best = max(self.slots, key=lambda s: _common(s.kept, prompt))
        shared = min(_common(best.kept, prompt), len(prompt) - 1)
        here = self.slots.index(slot)
        if best is not slot and shared > _common(slot.kept, prompt):
            self.api.llama_memory_seq_rm(self.memory, here, -1, -1)
            self.api.llama_memory_seq_cp(self.memory, self.slots.index(best), here, -1, -1)  # streams copy whole or not at all
        else:
            shared = min(_common(slot.kept, prompt), len(prompt) - 1)
        self.api.llama_memory_seq_rm(self.memory, here, shared, -1)
        return shared

    def _forget(self, slot: Slot) -> int:
        self.api.llama_memory_seq_rm(self.memory, self.slots.index(slot), -1, -1)
        return 0

    def _release(self, slot: Slot) -> None:
        slot.index, slot.todo = None, []

    def _compute(self) -> list[tuple[Slot, Any]]:
        """One `llama_decode`: prompt tokens if any are pending, else one token per running sequence. Returns rows of logits."""
        prompts = [s for s in self.slots if s.index is not None and s.count == 0]
        rows: list[tuple[Slot, int]] = []
        filled = 0
        for slot in prompts or [s for s in self.slots if s.index is not None]:
            take = slot.todo[: BATCH_TOKENS - filled]
            if not take:
                break
            slot.todo = slot.todo[len(take) :]
            filled = self._put(take, len(slot.kept), self.slots.index(slot), filled, last=not slot.todo)
            slot.kept.extend(take)
            if not slot.todo:
                rows.append((slot, filled - 1))
        self._decode(filled)
        return [(slot, self._logits(row)) for slot, row in rows]

    def _put(self, tokens: list[int], position: int, sequence: int, at: int, *, last: bool, every: bool = False) -> int:
        batch, end = self.batch, at + len(tokens)
        view = self.np.ctypeslib.as_array
        view(batch.token, (BATCH_TOKENS,))[at:end] = tokens
        view(batch.pos, (BATCH_TOKENS,))[at:end] = range(position, position + len(tokens))
        view(batch.n_seq_id, (BATCH_TOKENS,))[at:end] = 1
        view(batch.logits, (BATCH_TOKENS,))[at:end] = every
        for i in range(at, end):
            batch.seq_id[i][0] = sequence
        if last:
            batch.logits[end - 1] = True
        return end

    def _decode(self, count: int) -> None:
        self.batch.n_tokens = count
        if code := self.api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode failed with code {code}")

    def _logits(self, row: int) -> Any:
        return self.np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, row), (self.vocab_size,))

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.memory, False)
        for slot in self.slots:
            slot.kept = []

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        out = []
        for window in windows:
            self._clear()
            values: list[float] = []
            for start in range(0, len(window), MICRO_BATCH):
                part = window[start : start + MICRO_BATCH]
                self._decode(self._put(part, start, 0, 0, last=False, every=True))
                for row, token in enumerate(window[start + 1 : start + len(part) + 1]):
                    values.append(float(self._log_softmax(self._logits(row))[token]))
            out.append(values)
        self._clear()
        return out

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        out = []
        for context in contexts:
            self._clear()
            self._decode(self._put(context, 0, 0, 0, last=True))
            logprobs = self._log_softmax(self._logits(len(context) - 1))
            best = self.np.argpartition(-logprobs, top)[:top]
            out.append({int(i): float(logprobs[i]) for i in best})
        self._clear()
        return out

    def _log_softmax(self, logits: Any) -> Any:
        shifted = logits.astype(self.np.float64) - logits.max()
        return shifted - self.np.log(self.np.exp(shifted).sum())


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
