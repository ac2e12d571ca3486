"""`EngineConfig`: what a user can set. (What a checkpoint is: `model_config.py`.)

It is frozen. The command-line flags, the server's flags and the table in the docs are generated from its fields, so a setting exists in
one place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from minfer.errors import ConfigError

DType = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
AttentionBackend = Literal["auto", "flash_attn"]
KVCacheDType = Literal["auto", "fp32", "bf16", "fp16", "fp8", "fp8_e5m2", "int8", "int4"]
Device = Literal["auto", "cpu", "cuda"]
Quant = Literal["auto", "none", "awq", "gptq", "fp8", "int8", "int4", "nf4", "mxfp4", "smoothquant"]
CALIBRATED = ("awq", "gptq", "smoothquant")  # values of quant that have to see a model's inputs first
Activations = Literal["auto", "int8", "none"]
PolicyName = Literal["fcfs", "priority", "fair"]
Speculative = Literal["none", "ngram", "draft", "skip", "ngram+draft"]
ForcedTokens = Literal["auto", "on", "off"]
GuidedBackend = Literal["llguidance", "xgrammar"]
Overlap = Literal["auto", "on", "off"]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A config field with its one-line meaning, from which flags and docs are generated."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Every switch of the engine. A bad value or combination raises `ConfigError` when the config is built."""

    model: str = option("", "Short name, Hugging Face repo id, model folder or .gguf file.", positional=True)
    tokenizer: str | None = option(None, "Folder, .gguf file, short name or repo id whose tokenizer to use instead of the model's own.")
    revision: str | None = option(None, "Branch, tag or commit of the hub repository.")
    load_format: LoadFormat = option("auto", "How to read weights; dummy makes random ones of the named shape, with no download.")
    dtype: DType = option("auto", "Type of weights and activations; auto takes the checkpoint's, or bfloat16 for a quantised file.")
    device: Device = option("auto", "Where to run; auto takes a CUDA or ROCm device if there is one.")
    backend: str = option("auto", "Kernels to use: auto (fastest that fits), reference (plain torch), or a backend's name.")
    attention_backend: AttentionBackend = option(
        "auto",
        "Whose attention to use: auto takes the backend's own; flash_attn the FlashAttention-2 package, on NVIDIA GPUs, with blocks of 256 "
        "tokens or more.",
    )
    quant: Quant = option(
        "auto",
        "auto runs the checkpoint as it is, quantised where a kernel can; none dequantises it; the others quantise an unquantised one "
        "while it is loaded, once, and keep the result in the cache.",
    )
    activations: Activations = option(
        "auto",
        "Input of quantised matrices: none leaves it as it is; int8 rounds it per token, on the CPU per group too; auto is int8 on the "
        "CPU, and on a GPU what the matrix was calibrated for: int8, fp8 or none.",
    )
    graphs: bool = option(True, "Record the model's step once and replay it without Python between its ops, where the kernels allow it.")
    overlap: Overlap = option(
        "auto",
        "Launch the next step before the tokens of this one are waited for, so that a GPU never waits for the host; auto is on for GPUs "
        "and off on the CPU, where both share the cores. Steps with drafts, penalties, bad words, log-probabilities or grammars wait.",
    )
    threads: int | None = option(None, "CPU threads (default: the physical cores this process may use).")
    max_model_len: int | None = option(None, "Longest prompt plus output, in tokens (default: what the model was trained for).")
    block_size: int = option(16, "Tokens in one KV-cache block.")
    kv_cache_dtype: KVCacheDType = option(
        "auto", "How K and V are stored: auto as the model computes; fp8 (e4m3), fp8_e5m2, int8 and int4 with a scale per token and head."
    )
    kv_cache_memory: int | None = option(None, "Bytes for the KV cache (suffixes K, M, G; default: from --memory-utilization).", bytes=True)
    memory_utilization: float | None = option(
        None, "Share of free memory, after the weights are loaded, that the KV cache may take (default: 0.9 on a GPU, 0.5 on the CPU)."
    )
    max_num_seqs: int = option(64, "Most sequences that run at the same time.")
    max_num_batched_tokens: int = option(2048, "Token budget of one step, shared by prompts and running sequences.")
    max_prefill_chunk: int | None = option(None, "Most prompt tokens one sequence may take from a step (default: the whole budget).")
    prefix_caching: bool = option(True, "Keep the KV of finished prompts and reuse it for requests that begin the same way.")
    shared_prefix: int = option(
        8192,
        "Where all sequences of a step begin with the same cached blocks, attend to those once for all of them if that saves reading at "
        "least so many tokens' keys and values (GPUs; 0: never).",
    )
    policy: PolicyName = option(
        "fcfs", "Order of admission and preemption: fcfs, priority (lower runs first), or fair (API keys take turns, by tokens)."
    )
    speculative: Speculative = option(
        "none",
        "Guess tokens ahead and check them in one step: ngram copies what followed the same words earlier, draft asks a smaller model "
        "or a head made for this one, skip the model itself without some of its layers, ngram+draft asks only where ngram finds nothing.",
    )
    draft_model: str | None = option(
        None,
        "What --speculative draft or ngram+draft asks: a smaller model with the same vocabulary, or a folder with an EAGLE, EAGLE-3, "
        "Medusa or ReDrafter head for this one.",
    )
    skip_layers: str | None = option(
        None, "Layers, from 0, that --speculative skip leaves out, as 8-21 or 4,6,8 (default: the middle third)."
    )
    draft_states: str | None = option(
        None, "Layers after which an EAGLE-3 head reads the model's states, as 2,15,27 (default: what the head's config says)."
    )
    num_draft_tokens: int = option(8, "Most tokens guessed ahead for one sequence.")
    draft_top_k: int = option(
        1, "Tokens tried at each place of a draft, where an EAGLE, EAGLE-3 or Medusa head drafts: above 1, drafts branch into trees."
    )
    ngram_min_match: int = option(3, "Tokens that must agree before ngram copies what followed them.")
    lora: Mapping[str, str] | None = option(
        None, "LoRA adapter to serve beside the model, as NAME=FOLDER or NAME=REPO; requests ask for it by its name. May be repeated."
    )
    guided_backend: GuidedBackend = option(
        "llguidance",
        "Library behind structured output; xgrammar knows less of JSON Schema and has no limits on compiling.",
    )
    forced_tokens: ForcedTokens = option(
        "auto",
        "Let tokens that the form of an output leaves no choice about enter a step together: on, off, or auto (not where steps are "
        "replayed from CUDA graphs).",
    )
    adaptive_drafts: bool = option(True, "Draft only as many tokens as pay at the measured acceptance and step times; off: always all.")
    seed: int | None = option(None, "Seed for requests that bring none (default: fresh entropy for each).")
    trace: str | None = option(None, "File for a trace of every step, to be opened in https://ui.perfetto.dev or chrome://tracing.")

    def __post_init__(self) -> None:
        for name, kind in (
            ("load_format", LoadFormat),
            ("dtype", DType),
            ("device", Device),
            ("attention_backend", AttentionBackend),
            ("kv_cache_dtype", KVCacheDType),
            ("quant", Quant),
            ("activations", Activations),
            ("policy", PolicyName),
            ("speculative", Speculative),
            ("forced_tokens", ForcedTokens),
            ("guided_backend", GuidedBackend),
            ("overlap", Overlap),
        ):
            if getattr(self, name) not in get_args(kind):
                self._fail(name, f"must be one of {', '.join(get_args(kind))}")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "num_draft_tokens", "draft_top_k", "ngram_min_match"):
            self._at_least_one(name)
        for name in ("threads", "max_model_len", "kv_cache_memory", "max_prefill_chunk"):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        if self.shared_prefix < 0:
            self._fail("shared_prefix", "must be at least 0")
        if self.block_size > 1024 or self.block_size & (self.block_size - 1):
            self._fail("block_size", "must be a power of two up to 1024")
        if self.attention_backend == "flash_attn":
            self._check_flash_attn()
        if (self.speculative in ("draft", "ngram+draft")) != (self.draft_model is not None):
            self._fail(
                "draft_model",
                "must name the model that --speculative draft or ngram+draft asks, and be absent otherwise (each needs the other)",
            )
        if self.draft_top_k > 1 and self.draft_model is None:
            self._fail("draft_top_k", "must be 1 without a draft_model that is an EAGLE, EAGLE-3 or Medusa head")
        if self.draft_states is not None and (
            self.draft_model is None or not all(n.strip().isdigit() for n in self.draft_states.split(","))
        ):
            self._fail("draft_states", "must be numbers of layers, as 2,15,27, beside a draft_model")
        if self.skip_layers is not None and (
            self.speculative != "skip" or re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.skip_layers) is None
        ):
            self._fail("skip_layers", "must be layers, as 8-21 or 4,6,8, beside --speculative skip")
        if self.lora is not None:
            self._check_lora()
        if self.memory_utilization is not None and not 0 < self.memory_utilization <= 1:
            self._fail("memory_utilization", "must be above 0 and at most 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            self._fail(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs={self.max_num_seqs}, or running sequences would starve; raise it or lower max_num_seqs",
            )

    def overlaps(self, device: str) -> bool:
        """Whether steps overlap on this type of device."""
        return self.overlap == "on" or (self.overlap == "auto" and device != "cpu")

    def layers_kept(self, num_layers: int) -> list[int]:
        """The layers with which --speculative skip drafts."""
        if self.skip_layers is None:
            first = max(1, num_layers // 3)
            skipped = set(range(first, max(first + 1, num_layers - num_layers // 3)))
        else:
            ends = [[int(end) for end in part.split("-")] for part in self.skip_layers.split(",")]
            skipped = {number for first, *last in ends for number in range(first, (last or [first])[0] + 1)}
        kept = [number for number in range(num_layers) if number not in skipped]
        if not kept or not skipped or max(skipped) >= num_layers:
            raise ConfigError(f"skip_layers={self.skip_layers} must leave out some, not all, of the model's layers 0 to {num_layers - 1}")
        return kept

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Builds one from keyword arguments, refusing names that are not settings."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known are {', '.join(known)}")
        return cls(**options)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the LoRA adapters, in the order of their numbers, which count from 1."""
        return tuple(self.lora or ())

    def _check_flash_attn(self) -> None:
        """What can be said before the model and the device are known; `kernels/flash_attn.py` has the reasons."""
        if self.block_size % 256:
            self._fail("block_size", "must be 256, 512 or 1024 for attention_backend flash_attn")
        if self.dtype == "float32":
            self._fail("dtype", "must be float16 or bfloat16 for attention_backend flash_attn")
        if self.kv_cache_dtype not in ("auto", "bf16", "fp16"):
            self._fail("kv_cache_dtype", "must be auto for attention_backend flash_attn, which reads no quantised cache")
        if self.draft_top_k > 1:
            self._fail("draft_top_k", "must be 1 for attention_backend flash_attn, which can't verify drafts that branch")

    def _check_lora(self) -> None:
        pairs = dict(self.lora) if isinstance(self.lora, Mapping) else {"": ""}  # a copy: the caller's may change
        if not all(isinstance(text, str) and text and text.isprintable() for pair in pairs.items() for text in pair):
            self._fail("lora", "must map names of adapters to folders or hub ids")
        object.__setattr__(self, "lora", pairs or None)

    def _at_least_one(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._fail(name, "must be a whole number from 1")

    def _fail(self, name: str, rule: str) -> None:
        raise ConfigError(f"{name} {rule}, not {getattr(self, name)!r}")
