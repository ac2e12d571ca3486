"""`minfer quantize MODEL OUT`: a quantised checkpoint in a standard format, made layer by layer.

Interrupting it is safe: the same command goes on where it stopped.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minfer.cli.command import command
from minfer.cli.terminal import Terminal, human_bytes
from minfer.errors import ConfigError

if TYPE_CHECKING:
    from minfer.loader import Checkpoint, ModelSource
    from minfer.quantize import LayerReport, Recipe

Methods = Literal["rtn", "gptq", "awq", "smoothquant", "fp8", "fp8-static", "nf4", "mxfp4", "mxfp6", "mxfp8", "nvfp4"]


@command()
def quantize(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file or a name.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    method: Annotated[Methods, typer.Option(help="How.")] = "gptq",
    bits: Annotated[int, typer.Option(help="Of rtn, gptq and awq: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale, for rtn, gptq and awq; -1 is one scale a row.")] = 128,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Without or with zero points; by default awq has them and the others not.")
    ] = None,
    format: Annotated[str, typer.Option(help="auto, gptq, awq, compressed-tensors or bitsandbytes.")] = "auto",
    act_order: Annotated[
        Literal["none", "static", "group"],
        typer.Option(help="GPTQ: take important inputs first; with group, scales follow that order and kernels must reorder."),
    ] = "static",
    damping: Annotated[float, typer.Option(help="GPTQ: added to the diagonal of the Hessian, as a share of its mean.")] = 0.01,
    alpha: Annotated[float, typer.Option(help="SmoothQuant: share of the difficulty that moves into the weights.")] = 0.5,
    calibration: Annotated[str, typer.Option(help="A text or JSONL file; self: the model's own samples.", metavar="FILE|self")] = "self",
    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens of each.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Of the model's own samples.", min=0)] = 0,
    load_format: Annotated[Literal["auto", "dummy"], typer.Option(help="dummy: random weights in the model's shape.")] = "auto",
    max_layers: Annotated[int | None, typer.Option(help="Stop after so many layers, to see time and memory.", min=1)] = None,
) -> None:
    """Quantise a model into a checkpoint that minfer and other engines load."""
    from minfer.engine.progress import progress_bar
    from minfer.loader import open_checkpoint, resolve_model
    from minfer.quantize import Recipe, quantize_model

    recipe = Recipe(
        method=method, bits=bits, group_size=group_size, symmetric=sym, format=format, order=act_order, damping=damping, alpha=alpha
    )
    source = resolve_model(model, load_format=load_format)
    checkpoint = open_checkpoint(source)
    if seqlen > checkpoint.config.max_position_embeddings:
        raise ConfigError(f"--seqlen {seqlen} is more than the {checkpoint.config.max_position_embeddings} tokens this model was made for")
    started = time.perf_counter()
    reports: list[LayerReport] = []

    def data() -> list[list[int]]:
        return _calibration(terminal, checkpoint, source, model, calibration, samples, seqlen, seed, load_format)

    with progress_bar(f"Quantising ({recipe.label})", max_layers or checkpoint.config.num_layers) as progress:

        def on_layer(report: LayerReport) -> None:
            reports.append(report)
            progress.advance(note=_note(report))
            if not terminal.json:
                terminal.note(f"layer {report.layer + 1}/{report.layers}: {_note(report)}, {report.seconds:.1f} s")

        quantize_model(checkpoint, recipe, out, data, on_layer=on_layer, max_layers=max_layers)
    _report(terminal, recipe, out, reports, time.perf_counter() - started)


def _calibration(
    terminal: Terminal,
    checkpoint: Checkpoint,
    source: ModelSource,
    model: str,
    calibration: str,
    samples: int,
    seqlen: int,
    seed: int,
    load_format: Literal["auto", "dummy"],
) -> list[list[int]]:
    from minfer.quantize import read_calibration
    from minfer.tokenizer import Tokenizer

    if calibration != "self":
        tokens = checkpoint.tokenizer_source
        if tokens is None:
            raise ConfigError(f"{source.name} brings no tokenizer, so --calibration {calibration} can't be read; use --calibration self")
        tokenizer = Tokenizer.from_folder(tokens) if isinstance(tokens, Path) else Tokenizer.from_gguf_metadata(tokens)
        return read_calibration(Path(calibration), lambda text: tokenizer.encode(text, add_special_tokens=False), samples, seqlen)
    if checkpoint.tokenizer_source is None:  # random weights have nothing to say
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(checkpoint.config.vocab_size, (samples, seqlen), generator=generator).tolist()
    from minfer.engine.llm import LLM
    from minfer.engine.self_samples import self_samples

    terminal.note(f"letting the model write {samples} samples of {seqlen} tokens to calibrate with")
    llm = LLM(model=model, max_model_len=seqlen + 1, load_format=load_format)
    return self_samples(llm, samples, seqlen, seed)


def _note(report: LayerReport) -> str:
    if report.weight_error is None:
        return "done before"
    output = "" if report.output_error is None else f"output error {report.output_error:.4f}, "
    return f"{output}weight error {report.weight_error:.4f}"


def _report(terminal: Terminal, recipe: Recipe, out: Path, reports: list[LayerReport], seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    errors = [report.output_error for report in reports if report.output_error is not None]
    values: dict[str, Any] = {
        "out": str(out),
        "recipe": recipe.label,
        "format": recipe.writer().format,
        "finished": bool(files),
        "size_bytes": size,
        "mean_output_error": sum(errors) / len(errors) if errors else None,
        "layers": [
            {"layer": r.layer, "weight_error": r.weight_error, "output_error": r.output_error, "seconds": r.seconds} for r in reports
        ],
        "seconds": seconds,
        "peak_memory_bytes": peak,
    }
    if terminal.json:
        terminal.result(values)
        return
    done = f"{out}: {human_bytes(size)}, {recipe.writer().format}" if files else f"{out} is unfinished; the same command goes on"
    print(f"{done} ({recipe.label}; {seconds:.0f} s, at most {human_bytes(peak)} of memory)")
