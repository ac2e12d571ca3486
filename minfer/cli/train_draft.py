"""`minfer train-draft MODEL --out DIR`: a drafting head for a model, trained on the model's own answers.

Interrupting it is safe: the same command goes on where it stopped. What it needs for that lies in DIR/training.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minfer.cli.command import command
from minfer.cli.terminal import Terminal
from minfer.errors import ConfigError

if TYPE_CHECKING:
    from minfer.training import Kind, Progress, Recipe

TYPICAL_SHARE = 0.6  # of the longest answer; how many questions the model asks itself follows from it


@command()
def train_draft(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file or a name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    kind: Annotated[str, typer.Option(help="eagle3, medusa or redrafter.")] = "eagle3",
    data: Annotated[
        Path | None,
        typer.Option(help="Prompts, one a line: text, or JSON with messages or prompt. Without it the model asks itself.", metavar="FILE"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of answers to train on.", min=1000)] = 100_000,
    max_answer: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=8)] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Of the answers; the one that the head will be used at. (default: 0 and 0.8 in turn)", min=0.0)
    ] = None,
    depth: Annotated[int, typer.Option(help="Tokens guessed ahead.", min=1, max=16)] = 3,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Ids that the head can guess: the commonest of the answers. (default: 4096)", min=16)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the answers.", min=1)] = 5,
    batch: Annotated[int, typer.Option(help="Sequences in one training step.", min=1)] = 2,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of AdamW.")] = 1.5e-3,
    start_from: Annotated[
        Path | None, typer.Option(help="A head made before, to go on from with other answers (another --seed).", metavar="DIR")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of questions, answers and weights.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: the physical cores).", min=1)] = None,
) -> None:
    """Train a drafting head on the model's own answers; use it with --speculative draft --draft-model DIR."""
    from minfer.loader.heads import read_head
    from minfer.training import KINDS, Recipe, publish, read_published, train

    if kind not in KINDS:
        raise ConfigError(f"--kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if start_from is not None and draft_vocab is not None:
        raise ConfigError("--draft-vocab can't be given with --start-from: a head keeps the ids that it can guess")
    if start_from is not None:  # before the answers are made, which takes long
        read_published(start_from)
        if (made := read_head(start_from).config.kind) != kind:
            raise ConfigError(f"--start-from {start_from} is a head of the kind {made}, and --kind asks for {kind}")
    known: Any = kind
    folder = out / "training"
    started = time.monotonic()
    target, after = _collected(terminal, model, data, folder, tokens, max_answer, temperature, seed, threads)
    recipe = Recipe(
        kind=known, depth=depth, vocabulary=draft_vocab or 4096, epochs=epochs, batch=batch, max_len=max_answer + 128,
        learning_rate=learning_rate, seed=seed, start_from=start_from,
    )  # fmt: skip
    head, progress = train(target, recipe, folder, _reporter(terminal, recipe))
    publish(head, kind, after, out, progress.acceptance, model)
    _result(terminal, out, known, progress, time.monotonic() - started)


def _collected(
    terminal: Terminal,
    model: str,
    data: Path | None,
    folder: Path,
    tokens: int,
    max_answer: int,
    temperature: float | None,
    seed: int,
    threads: int | None,
) -> tuple[Any, list[int]]:
    """The target's parts and the layers whose states a head reads, once there are enough answers on disk."""
    import torch

    from minfer.config import EngineConfig
    from minfer.kernels.cpu.threads import available_cores
    from minfer.loader import open_checkpoint, resolve_model
    from minfer.runner import load_model
    from minfer.training import TEMPERATURES, Target, collect

    checkpoint = open_checkpoint(resolve_model(model))
    layers = checkpoint.config.num_layers
    after = [2, layers // 2, layers - 3]
    if layers < 7:
        raise ConfigError(f"{model} has {layers} layers; heads are trained on the states after three of them, and need at least 7")
    length = min(max_answer + 256, checkpoint.config.max_position_embeddings)
    options: dict[str, Any] = {"model": model, "max_model_len": length, "max_num_seqs": 32, "prefix_caching": False, "threads": threads}
    prompts = _prompts(terminal, options, data, folder, int(tokens / (TYPICAL_SHARE * max_answer)) + 64, length - max_answer, seed)
    loaded = load_model(EngineConfig(**options))
    started, first = time.monotonic(), -1
    temperatures = TEMPERATURES if temperature is None else (temperature,)
    for total in collect(loaded, prompts, after, folder, tokens, max_answer, temperatures):
        first = total if first < 0 else first
        rate = (total - first) / (time.monotonic() - started)
        left = f", {_minutes((tokens - total) / rate)} left" if rate > 0 and total < tokens else ""
        terminal.note(f"answers: {total:,} of {tokens:,} tokens, {rate:,.0f} tokens/s{left}")
    torch.set_num_threads(threads or available_cores())
    return Target.of(loaded.checkpoint), after


def _prompts(
    terminal: Terminal, options: dict[str, Any], data: Path | None, folder: Path, count: int, longest: int, seed: int
) -> list[list[int]]:
    """A file's, or the model's own, which are kept for when the command is repeated."""
    from minfer.engine.llm import LLM
    from minfer.training import ask_itself, read_prompts

    kept = folder / "questions.json"
    if data is None and kept.is_file():
        found: list[list[int]] = json.loads(kept.read_text())
        return found
    llm = LLM(**{**options, "prefix_caching": True})
    if data is not None:
        return read_prompts(data, llm.get_tokenizer(), longest)
    terminal.note(f"no --data: {options['model']} asks itself {count} questions")
    prompts = ask_itself(llm, count, seed, show_progress=not terminal.json)
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(prompts))
    return prompts


def _reporter(terminal: Terminal, recipe: Recipe) -> Any:
    last = [0.0, 0]

    def on_step(progress: Progress) -> None:
        now = time.monotonic()
        if progress.epoch != last[1]:
            last[1] = progress.epoch
            terminal.note(f"pass {progress.epoch} of {recipe.epochs} done: {_shares(progress.acceptance)}")
        elif now - last[0] > 10:
            last[0] = now
            terminal.note(
                f"step {progress.steps} of about {progress.total}, loss {progress.loss:.3f}, {_minutes(progress.seconds_left)} left"
            )

    return on_step


def _shares(acceptance: list[float]) -> str:
    """Of the held-out positions, and the tokens that a step would bring if all drafts were always checked."""
    shares = ", ".join(f"{share:.0%}" for share in acceptance)
    return f"held-out drafts right to depth 1, 2, ...: {shares}; {1 + sum(acceptance):.2f} tokens a step"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _result(terminal: Terminal, out: Path, kind: Kind, progress: Progress, seconds: float) -> None:
    values = {"out": str(out), "kind": kind, "steps": progress.steps, "loss": progress.loss, "seconds": seconds}
    if terminal.json:
        terminal.result({**values, "held_out_acceptance": progress.acceptance})
        return
    print(f"{out}: {kind} head, {_shares(progress.acceptance)} ({_minutes(seconds)}); {out / 'training'} may be removed")
