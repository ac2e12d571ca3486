"""What every engine is asked to do: seeded, in token counts, the same ids for all.

A workload is a list of cases; a case is one set of requests and the figure that it is about. Prompts of the speed workloads
are random ids (no tokenizer can tilt them, no prefix cache can hit by chance); output lengths are forced. The `essay` prompt
and the prompts of `quality` are real text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compare.errors import CompareError
from compare.measure import Slo
from compare.protocol import Request

Kind = Literal["generate", "quality", "load", "memory"]
LOWEST_ID = 256  # below lie the control tokens of every vocabulary in use


@dataclass(frozen=True)
class Case:
    """One cell's work. metric: the figure the tables show, a key of `measure.summarise` or of the quality figures.

    concurrency: most requests in flight. repeats: fixes the number of repeats where the workload's definition does.
    """

    workload: str
    name: str
    metric: str
    requests: tuple[Request, ...] = ()
    kind: Kind = "generate"
    concurrency: int = 1
    prefix_caching: bool = False
    higher_is_better: bool = True
    slo: Slo | None = None
    repeats: int | None = None
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.workload}/{self.name}"

    @property
    def max_context(self) -> int:
        return max((len(r.token_ids) + r.max_tokens for r in self.requests), default=0)


@dataclass(frozen=True)
class Source:
    """Where prompts come from: the size of the vocabulary, the longest context, and the tokenizer's `encode` for real text."""

    vocab_size: int
    max_context: int
    encode: Callable[[str], list[int]]
    real: bool = True
    seed: int = 0
    scale: float = 1.0  # below 1: shorter and fewer, for trying things out; said in the report

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")  # a workload's ids don't depend on which others are run

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        low = LOWEST_ID if self.vocab_size > 2 * LOWEST_ID else self.vocab_size // 2
        return [rng.randrange(low, self.vocab_size) for _ in range(count)]

    def scaled(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.scale))


def latency(source: Source) -> list[Case]:
    """One request: 512 tokens in, 128 out."""
    rng = source.rng("latency")
    request = Request(source.tokens(rng, source.scaled(512, 8)), source.scaled(128, 4))
    return [Case("latency", "batch 1", "decode_tokens_per_s", (request,))]


def prefill(source: Source) -> list[Case]:
    """One request of 128 to 4,096 tokens, one token out."""
    rng = source.rng("prefill")
    sizes = [n for n in (128, 512, 1024, 2048, 4096) if n < source.max_context]
    return [Case("prefill", f"{n} in", "prefill_tokens_per_s", (Request(source.tokens(rng, source.scaled(n, 8)), 1),)) for n in sizes]


def decode_sweep(source: Source) -> list[Case]:
    """1 to 64 sequences at once, 128 tokens in, 64 out."""
    cases = []
    for batch in (1, 2, 4, 8, 16, 32, 64):
        rng = source.rng(f"decode-sweep {batch}")
        requests = tuple(Request(source.tokens(rng, source.scaled(128, 8)), source.scaled(64, 4)) for _ in range(batch))
        cases.append(Case("decode-sweep", f"batch {batch}", "decode_tokens_per_s", requests, concurrency=batch))
    return cases


def throughput(source: Source) -> list[Case]:
    """64 requests at once, 64 to 512 in, 128 out."""
    rng = source.rng("throughput")
    requests = tuple(
        Request(source.tokens(rng, source.scaled(rng.randint(64, 512), 4)), source.scaled(128, 4)) for _ in range(source.scaled(64, 4))
    )
    return [Case("throughput", "offline", "output_tokens_per_s", requests, concurrency=min(64, len(requests)))]


def serving(source: Source) -> list[Case]:
    """Poisson arrivals at several rates, 64 to 512 in, 16 to 128 out; goodput under the stated limits."""
    cases = []
    for rate in (0.5, 1.0, 2.0, 4.0):
        rng = source.rng(f"serving {rate}")
        clock, requests = 0.0, []
        for _ in range(source.scaled(40, 4)):
            tokens = source.tokens(rng, source.scaled(rng.randint(64, 512), 4))
            requests.append(Request(tokens, source.scaled(rng.randint(16, 128), 2), arrival=clock))
            clock += rng.expovariate(rate)
        cases.append(Case("serving", f"{rate:g} req/s", "goodput_per_s", tuple(requests), concurrency=64, slo=Slo()))
    return cases


def shared_prefix(source: Source) -> list[Case]:
    """Prefix caching on: one 1,000-token system prompt under many questions, and a chat that grows turn by turn."""
    rng = source.rng("shared-prefix")
    system = source.tokens(rng, source.scaled(1000, 16))
    questions = [source.tokens(rng, source.scaled(32, 4)) for _ in range(source.scaled(16, 3))]
    # The first question comes alone, as it would in life; the rest follow when its prompt has surely been computed.
    many = tuple(Request(system + q, source.scaled(32, 2), arrival=0.0 if i == 0 else 3.0) for i, q in enumerate(questions))
    history, turns = list(system), []
    for turn in range(4):
        history += source.tokens(rng, source.scaled(32, 4))
        turns.append(Request(list(history), source.scaled(32, 2), arrival=3.0 * turn))
        history += source.tokens(rng, source.scaled(32, 2))
    return [
        Case("shared-prefix", "questions", "ttft_p50_s", many, concurrency=16, prefix_caching=True, higher_is_better=False),
        Case("shared-prefix", "chat", "ttft_p50_s", tuple(turns), prefix_caching=True, higher_is_better=False),
    ]


def long_context(source: Source) -> list[Case]:
    """As much of 8,192 tokens as the model has, 64 of them out."""
    rng = source.rng("long-context")
    total = source.scaled(min(8192, source.max_context), 64)
    out = source.scaled(64, 4)
    return [Case("long-context", f"{total - out} in", "decode_tokens_per_s", (Request(source.tokens(rng, total - out), out),))]


def essay(source: Source) -> list[Case]:
    """The original benchmark: one prompt, batch 1, 512 new tokens, 10 repetitions."""
    prompt = source.encode("Write an essay about the transformer model architecture")
    request = Request(prompt, source.scaled(512, 8))
    return [Case("essay", "512 out", "output_tokens_per_s", (request,), repeats=source.scaled(10, 2))]


def quality(source: Source) -> list[Case]:
    """Greedy agreement with fp32 transformers, KL of next-token distributions, perplexity."""
    if not source.real:
        raise CompareError("quality means nothing with random weights; leave it out, or take --model smollm2-135m")
    return [
        Case("quality", "agreement", "agreement", kind="quality", repeats=1),
        Case("quality", "next token", "kl", kind="quality", repeats=1, higher_is_better=False),
        Case("quality", "perplexity", "perplexity", kind="quality", repeats=1, higher_is_better=False),
    ]


def load_time(source: Source) -> list[Case]:
    """From starting the process to the first token of a short prompt, files already in the page cache."""
    request = Request(source.tokens(source.rng("load-time"), 8), 1)
    return [Case("load-time", "to first token", "load_s", (request,), kind="load", higher_is_better=False)]


def memory(source: Source) -> list[Case]:
    """Peak resident memory of a fresh process after one 512 + 128 request."""
    requests = latency(source)[0].requests
    return [Case("memory", "batch 1", "peak_resident_bytes", requests, kind="memory", higher_is_better=False, repeats=1)]


WORKLOADS: dict[str, Callable[[Source], list[Case]]] = {
    "latency": latency,
    "prefill": prefill,
    "decode-sweep": decode_sweep,
    "throughput": throughput,
    "serving": serving,
    "shared-prefix": shared_prefix,
    "long-context": long_context,
    "essay": essay,
    "quality": quality,
    "load-time": load_time,
    "memory": memory,
}


def build(names: Sequence[str], source: Source) -> list[Case]:
    """The cases of the named workloads; `prefill/512` is that case of it alone. Raises `CompareError` that lists the names."""
    cases: list[Case] = []
    for name in names:
        workload, _, only = name.partition("/")
        if workload not in WORKLOADS:
            raise CompareError(f"no workload is called {workload!r}; known are {', '.join(WORKLOADS)}")
        made = WORKLOADS[workload](source)
        chosen = [c for c in made if not only or only in (c.name, *c.name.split())]
        if not chosen:
            raise CompareError(f"{workload} has no case {only!r}; it has {', '.join(c.name for c in made)}")
        cases += [c for c in chosen if c.max_context <= source.max_context and c not in cases]
    return cases


@dataclass(frozen=True)
class QualityText:
    """Prompts and windows of `quality`. windows: of 1,024 tokens, from the text file given; empty where none was."""

    prompts: list[list[int]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    max_tokens: int = 64


_ASKS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "List three facts about {}.",
    "What is the history of {}?",
    "Why does {} matter today?",
    "Tell a story in which {} plays a part.",
    "Compare {} with something similar.",
    "What do most people get wrong about {}?",
    "Give me a plan for learning about {} in a week.",
    "Translate the word '{}' into French and use it in a sentence.",
)
_TOPICS = ("bread", "rivers", "the moon", "chess", "bicycles", "volcanoes", "money", "clocks", "honey bees", "prime numbers")


def quality_text(source: Source, text: Path | None, prompts: int = 100, windows: int = 32, max_tokens: int = 64) -> QualityText:
    """100 questions in ChatML (no text of others is needed), and the first windows of a text file, joined, without BOS."""
    asks = [ask.format(topic) for topic in _TOPICS for ask in _ASKS]
    chat = [source.encode(f"<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n") for a in asks[:prompts]]
    cut: list[list[int]] = []
    if text is not None:
        ids = source.encode(text.read_text(encoding="utf-8"))
        cut = [ids[i : i + 1024] for i in range(0, len(ids) - 1023, 1024)][:windows]
        if not cut:
            raise CompareError(f"{text} has fewer than 1,024 tokens; perplexity needs at least one full window")
    return QualityText(chat, cut, max_tokens)
