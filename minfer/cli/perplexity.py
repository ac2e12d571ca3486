"""`minfer perplexity`: how well a model predicts a text, exp(mean negative log-likelihood per token).

The convention of GPTQ, llama.cpp and most tables: the file is one stream of tokens, cut into windows of `--window` tokens, each
predicted from its own beginning; no BOS unless asked for. With `--stride` below the window, windows overlap and only tokens
that the window before has not scored count, so every token has at least window - stride tokens of context. A shorter last window
counts too. The engine's own scoring of prompts does the work, so this measures what is served.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minfer.cli.command import command
from minfer.cli.engine import load_llm, only_adapter
from minfer.cli.options import engine_flags
from minfer.cli.terminal import Terminal
from minfer.config import EngineConfig
from minfer.errors import ConfigError, RequestError
from minfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minfer.engine.llm import LLM
    from minfer.engine.outputs import RequestOutput
    from minfer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """A piece of the text; the log-probabilities of its tokens from `first` on count."""

    ids: list[int]
    first: int


@command(engine=engine_flags(leave_out=["seed"]))
def perplexity(
    terminal: Terminal,
    engine: EngineConfig,
    file: Annotated[str, typer.Argument(help="A UTF-8 text file; - reads stdin.", show_default=False)],
    window: Annotated[int, typer.Option(help="Tokens in one window.", min=2)] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens from one window's start to the next (default: the window).", min=1)] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after this many windows.", min=1)] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Begin each window with the model's BOS token, beside its own.")] = False,
) -> None:
    """Measure a model's perplexity on a text."""
    if stride is not None and stride > window:
        raise ConfigError(f"--stride {stride} is longer than --window {window}, so tokens would be left out; make it at most the window")
    text = read_text(file)
    only_adapter(engine)
    llm, phases = load_llm(terminal, engine)
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    prefix = _bos(llm.get_tokenizer()) if bos else []
    _check_length(len(prefix) + min(window, len(ids)), llm)
    cut = list(windows(ids, window, stride or window, lowest=1 - len(prefix)))[:max_windows]
    if not cut:
        raise RequestError(f"{file} holds {len(ids)} token{'s' if len(ids) != 1 else ''}, too few to predict any; give a longer text")
    started = time.perf_counter()
    scores = score(llm, cut, prefix, show_progress=True)
    seconds = time.perf_counter() - started
    mean = -math.fsum(scores) / len(scores)
    variance = math.fsum((-value - mean) ** 2 for value in scores) / max(len(scores) - 1, 1)
    result = {
        "model": engine.model,
        "perplexity": exp(mean),
        "standard_error": exp(mean) * math.sqrt(variance / len(scores)),
        "tokens": len(scores),
        "windows": len(cut),
        "window": window,
        "stride": stride or window,
        "bos": bos,
        "dtype": llm.engine.config.dtype,
        "kv_cache_dtype": llm.engine.config.kv_cache_dtype,
        "mean_negative_log_likelihood": mean,
        "seconds": seconds,
        "load_seconds": phases,
    }
    if terminal.json:
        terminal.result(result)
    else:
        print(f"{result['perplexity']:.4f} ± {result['standard_error']:.4f}")
        terminal.note(f"perplexity of {len(scores)} predictions in {len(cut)} windows, {seconds:.1f} s")


def read_text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error


def windows(ids: Sequence[int], size: int, stride: int, lowest: int = 1) -> Iterator[Window]:
    """Cuts a text. Each token is scored once, except that nothing predicts one that begins a window without overlap; with a BOS
    in front of the window (`lowest=0`) it is predicted too.
    """
    scored = 0  # tokens before this one are done with
    for start in range(0, len(ids), stride):
        part = list(ids[start : start + size])
        first = max(scored - start, lowest)
        if first < len(part):
            yield Window(part, first)
            scored = start + len(part)
        if start + size >= len(ids):
            return


def score(llm: LLM, cut: Sequence[Window], prefix: list[int], *, show_progress: bool) -> list[float]:
    """The log-probability of every token that counts, in order. As many windows run together as fill one step."""
    from minfer.engine.progress import progress_bar

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    together = max(1, llm.engine.config.max_num_batched_tokens // max(len(w.ids) for w in cut))
    scores: list[float] = []
    with progress_bar("Scoring windows", len(cut), show_progress) as progress:
        for begin in range(0, len(cut), together):
            part = cut[begin : begin + together]
            prompts = [{"prompt_token_ids": prefix + w.ids} for w in part]
            outputs = llm.generate(prompts, params, use_tqdm=False, lora=only_adapter(llm.engine.config))
            for item, output in zip(part, outputs, strict=True):
                scores += _counted(item, len(prefix), output)
                progress.advance(note=f"perplexity {exp(-math.fsum(scores) / len(scores)):.3f}")
    return scores


def _counted(window: Window, shift: int, output: RequestOutput) -> list[float]:
    """`shift` tokens stand before the window's own in the prompt."""
    positions = output.prompt_logprobs
    assert positions is not None, "the request asked for them"
    pairs = zip(window.ids[window.first :], positions[shift + window.first :], strict=True)
    return [position[token].logprob for token, position in pairs if position is not None]


def _bos(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_token_id is None:
        raise ConfigError("--bos was asked for, but this model's tokenizer names no BOS token; leave it out")
    return [tokenizer.bos_token_id]


def _check_length(tokens: int, llm: LLM) -> None:
    limit = llm.engine.inputs.max_model_len
    if tokens >= limit:  # the engine needs room for one token of output
        raise ConfigError(f"windows of {tokens} tokens don't fit a context of {limit} with its one token of output; lower --window")


def exp(value: float) -> float:
    """Infinity where the mean is too large: such a model predicts nothing."""
    return math.exp(value) if value < 700 else math.inf
