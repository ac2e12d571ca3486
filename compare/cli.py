"""`python -m compare`: the command line. Needs typer and rich (`pip install "minfer[cli]"`)."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compare import machine
from compare.engines import all_infos, info_of
from compare.environments import clean as clean_engine
from compare.environments import find_python, why_not
from compare.environments import setup as setup_engine
from compare.errors import CompareError
from compare.report import write_reports
from compare.report.console import print_run
from compare.report.markdown import replace_block
from compare.results import read_results
from compare.session import Asked, run_session
from compare.weights import MODELS
from compare.workloads import WORKLOADS

app = typer.Typer(help="The same workloads through minfer and its peers, in one run, on one machine.", no_args_is_help=False)
console = Console(stderr=True)  # tables and progress; stdout is for --json

DEFAULT_WORKLOADS = "latency,prefill,throughput"


def main() -> None:
    """Entry point: a mistake in what was asked is one sentence and exit status 2."""
    try:
        app()
    except CompareError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    against: Annotated[str, typer.Option(help="Engines, by comma; ENGINE/PRECISION fixes one; openai=URL is any server; all.")] = "",
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, or an HF folder.")] = "smollm2-135m",
    precision: Annotated[str, typer.Option(help="bf16, int8, int4, fp16, fp32, q4_1, ... by comma (default: bf16,int8,int4).")] = "",
    workload: Annotated[str, typer.Option(help=f"By comma: {', '.join(WORKLOADS)}, or all; prefill/512 is one case.")] = DEFAULT_WORKLOADS,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, pinned (0: every physical core).")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of every case.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    text: Annotated[
        Path | None, typer.Option(help="Text for perplexity, such as WikiText-2's test split.", exists=True, dir_okay=False)
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens that perplexity reads.")] = 32,
    prompts: Annotated[int, typer.Option(min=1, max=100, help="Prompts of the quality workload.")] = 100,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which one cell is ended as hanging.")] = 900,
    time_budget: Annotated[float, typer.Option(min=0, help="Minutes: repeats beyond the first are run while they fit (0: all).")] = 0,
    case_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that an engine's repeats of one case may take together; the first always runs (0: any).")
    ] = 300,
    scale: Annotated[float, typer.Option(min=0.001, max=1, help="Below 1: shorter and fewer requests, to try things out.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results (default: results/DATE-HOST).")] = None,
    resume: Annotated[Path | None, typer.Option(help="A results folder: run what is missing there.", exists=True, file_okay=False)] = None,
    here: Annotated[bool, typer.Option("--here", help="Use this interpreter for engines that it has.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare minfer with other engines, and write results.json, report.md and report.html."""
    if context.invoked_subcommand is not None:
        return
    asked = Asked(
        against=split(against),
        model=model,
        precisions=split(precision),
        workloads=list(WORKLOADS) if workload == "all" else split(workload),
        threads=threads,
        repeats=repeats,
        device=machine.detect_device() if device == "auto" else device,
        text=text,
        windows=windows,
        prompts=prompts,
        limit=limit,
        time_budget=time_budget,
        case_seconds=case_seconds,
        scale=scale,
        here=here,
        command=public_command(sys.argv[1:]),
    )
    folder = resume or out or Path("results") / f"{time.strftime('%Y-%m-%d')}-{machine.describe()['host']}"
    finished = run_session(asked, folder, console, resume=resume is not None)
    results = read_results(folder)
    write_reports(results, folder)
    print_run(results, console)
    console.print(f"results, report.md and report.html are in {folder}", highlight=False)
    if as_json:
        print(json.dumps(results.as_json()))
    if not finished:
        raise typer.Exit(130)


def public_command(arguments: Sequence[str]) -> str:
    """The command as a reader would type it: without where its results went, and of every path only the last name."""
    words: list[str] = []
    left = iter(arguments)
    for word in left:
        name, _, value = word.partition("=")
        if name in ("--out", "--resume"):
            if not value:
                next(left, None)
            continue
        is_path = os.sep in value and not value.startswith("http") and name in ("--model", "--text")
        words.append(f"{name}={Path(value).name}" if is_path else word)
    for index, word in enumerate(words[:-1]):
        if word in ("--model", "--text"):
            words[index + 1] = Path(words[index + 1]).name
    return shlex.join(["python", "-m", "compare", *words])


@app.command("list")
def list_engines(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Every engine known: what it can do, whether it is installed, and why not if it can't be here."""
    device = machine.detect_device() if device == "auto" else device
    rows = [engine_row(info.name, device) for info in all_infos()]
    if as_json:
        print(json.dumps({"device": device, "engines": rows}))
        return
    out = Console()
    for state in dict.fromkeys(sorted((row["state"] for row in rows), key=_state_order)):
        out.print(f"[bold]{state}[/]" + (f" ({device})" if state == "runs here" else ""), highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True, min_width=15)
        table.add_column(overflow="fold")
        for row in rows:
            if row["state"] == state:
                facts = ["installed" if row["installed"] else "", " ".join(row["precisions"])]
                facts += [f"{row['batching']} batching" if row["batching"] else "", "logprobs" if row["scores"] else ""]
                lines = [", ".join(f for f in facts if f), f"[dim]{escape(row['note'])}[/]" if row["note"] not in ("", state) else ""]
                table.add_row(row["name"], "\n".join(line for line in lines if line))
        out.print(table)


def _state_order(state: str) -> int:
    """What runs first, what can't be had last."""
    return next((i for i, word in enumerate(("runs here", "runs on", "through")) if state.startswith(word)), 3)


@app.command()
def setup(engines: Annotated[list[str], typer.Argument(help="Engines to install.")]) -> None:
    """Make the isolated environment of one or more engines."""
    device = machine.detect_device()
    for name in engines:
        python = setup_engine(info_of(name), device, lambda line: console.print(line, highlight=False))
        console.print(f"{name}: ready, {python}", highlight=False)


@app.command()
def clean(
    engines: Annotated[list[str], typer.Argument(help="Engines whose environment and converted weights go; all for every one.")],
) -> None:
    """Remove environments and converted weights."""
    names = [i.name for i in all_infos()] if engines == ["all"] else [info_of(e).name for e in engines]
    for name in names:
        if clean_engine(name):
            console.print(f"{name}: removed", highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders; several are merged and set side by side.", exists=True)],
    out: Annotated[Path | None, typer.Option(help="Where to write (default: the first folder).")] = None,
    readme: Annotated[Path | None, typer.Option(help="File whose compare:begin/end block becomes this run's table.", exists=True)] = None,
) -> None:
    """Write report.md and report.html again from results; no engine is needed. Several runs are compared with each other."""
    runs = [read_results(folder) for folder in folders]
    target = out or folders[0]
    target.mkdir(parents=True, exist_ok=True)
    write_reports(runs[0], target, others=runs[1:])
    for results in runs:
        print_run(results, console)
    if readme is not None:
        readme.write_text(replace_block(readme.read_text(encoding="utf-8"), runs[0], folders[0].as_posix()), encoding="utf-8")
    console.print(f"report.md and report.html are in {target}", highlight=False)


def engine_row(name: str, device: str) -> dict[str, Any]:
    """One line of `list`: state is one of the four words that the README uses, with the reason in `note`."""
    info = info_of(name)
    reason = why_not(info, device)
    if info.server:
        state = "through its server"
    elif reason is None:
        state = "runs here"
    elif info.devices() and device not in info.devices():
        state = f"runs on {' and '.join(d.upper() for d in info.devices())} only"
    else:
        state = "cannot be installed"
    return {
        "name": info.name,
        "title": info.title,
        "url": info.url,
        "state": state,
        "installed": find_python(info, device, here=True) is not None if reason is None else False,
        "precisions": list(info.precisions.get(device, next(iter(info.precisions.values()), ()))),
        "batching": info.batching if info.adapter else "",
        "scores": info.scores,
        "note": (info.reason or (reason or "")) if reason or info.reason else info.setting,
    }


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
