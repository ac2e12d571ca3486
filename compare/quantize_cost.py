"""What quantising costs: memory and processor time of `minfer quantize`, and of `minfer serve --quant awq`, which does it once; and
what each element saves in the products of a step.

    python -m compare.quantize_cost --out FILE run llama2-7b --load-format dummy --method rtn --group-size 128
    python -m compare.quantize_cost --out FILE serve smollm2-135m --quant awq
    python -m compare.quantize_cost --out FILE products --kinds q4_0 nf4 fp8 bfloat16 --rows 1 64 --threads 2
    python -m compare.quantize_cost --from FILE

`run` makes a checkpoint in a temporary folder (`--work` says on which disk) and removes it; `serve` starts the server twice with an
empty cache and asks it for one sentence each time; `products` is `python -m minfer.kernels.cpu.linear_bench`, for an idle machine.
`--out` keeps an entry for each command; the last form makes the tables of docs/quantization.md of them. Times of the first two are of
the processor, all threads together, because other programs shared the machine they were taken on; a wait for a disk is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare import machine
from compare.errors import CompareError
from compare.load.server import served
from compare.process import ROOT
from minfer import __version__

PAGE = ROOT / "docs" / "quantization.md"


def run(arguments: list[str], work: Path | None) -> dict[str, Any]:
    """One `minfer quantize MODEL OUT ...`, whose OUT is made and removed here."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        command = [sys.executable, "-m", "minfer", "quantize", arguments[0], f"{folder}/out", *arguments[1:], "--json"]
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise CompareError(f"minfer quantize {shlex.join(arguments)} failed: {done.stdout.strip()[-300:]}")
    told = json.loads(done.stdout)
    return {
        "command": f"minfer quantize {shlex.join([arguments[0], 'OUT', *arguments[1:]])}",
        "recipe": told["recipe"],
        "model": arguments[0],
        "layers": len(told["layers"]),
        "finished": told["finished"],
        "size_bytes": told["size_bytes"],
        "peak_memory_bytes": told["peak_memory_bytes"],
        "weight_error": [layer["weight_error"] for layer in told["layers"]],
        "output_error": [layer["output_error"] for layer in told["layers"]],
        "seconds": time.monotonic() - started,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def serve(arguments: list[str], work: Path | None) -> dict[str, Any]:
    """`minfer serve MODEL ...` twice, from nothing to an answer, with a cache that is empty before the first."""
    starts = []
    with tempfile.TemporaryDirectory(dir=work) as cache:
        os.environ["MINFER_CACHE"] = cache
        for _ in range(2):
            started = time.monotonic()
            with served(arguments[0], arguments[1:]) as server:
                ready = time.monotonic() - started
                starts.append({"seconds": ready, "cpu_seconds": server.cpu_seconds(), "answer": _answer(server.url)})
        size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    return {"command": f"minfer serve {shlex.join(arguments)}", "model": arguments[0], "starts": starts, "cache_bytes": size}


def products(arguments: list[str], work: Path | None) -> dict[str, Any]:
    """What linear_bench says in its last line, `work` is not needed."""
    command = [sys.executable, "-m", "minfer.kernels.cpu.linear_bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CompareError(f"linear_bench {shlex.join(arguments)} failed")
    told = json.loads(done.stdout.splitlines()[-1])
    return {"command": f"python -m minfer.kernels.cpu.linear_bench {shlex.join(arguments)}", "products": told}


def _answer(url: str) -> str:
    body = json.dumps({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["text"])


def keep(file: Path, entry: dict[str, Any]) -> None:
    """Into the file, in the place of an earlier entry of the same command."""
    results = json.loads(file.read_text()) if file.exists() else {"entries": []}
    others = [old for old in results["entries"] if old["command"] != entry["command"]]
    entries = [*others, {**entry, "minfer": __version__, "machine": machine.describe()}]
    file.write_text(json.dumps({"entries": entries}, indent=1) + "\n")


# The name of a kind in linear_bench: what people call it.
KINDS = {
    "q4_0": "int4, groups of 32",
    "q4_1": "int4, groups of 32, zero points",
    "q8_0": "int8, groups of 32",
    "q6_k": "int8, groups of 16 (GGUF Q6_K)",
    "q2_k": "int4, groups of 16, minima (GGUF Q2_K)",
    "iq4_nl": "a table of 16 values (GGUF IQ types)",
    "mxfp6": "mxfp6, as int8",
    "fp8": "fp8",
}


def costs(results: dict[str, Any]) -> str:
    """Of making checkpoints, and of starting with one that isn't there yet."""
    made, started = [], []
    for entry in results["entries"]:
        if "layers" in entry:
            written = f"{entry['size_bytes'] / 1e9:.2f} GB" if entry["finished"] else "stopped there"
            peak = f"{entry['peak_memory_bytes'] / 1e9:.2f} GB"
            made.append(f"| `{entry['command']}` | {entry['layers']} | {peak} | {entry['cpu_seconds'] / 60:.1f} min | {written} |")
        if "starts" in entry:
            first, second = entry["starts"]
            times = f"{first['cpu_seconds']:.0f} s | {second['cpu_seconds']:.1f} s"
            same = "equal" if first["answer"] == second["answer"] else "different"
            started.append(f"| `{entry['command']}` | {times} | {entry['cache_bytes'] / 1e6:.0f} MB | {same} |")
    tables = []
    if made:
        tables.append(["| command | layers | memory at most | processor time | written |", "|---|---|---|---|---|", *made])
    if started:
        tables.append(["| command | first start | second start | kept | both answers |", "|---|---|---|---|---|", *started])
    return "\n".join("\n".join([*table, ""]) for table in tables)


def speeds(results: dict[str, Any]) -> str:
    """Of every kind, a step of each number of tokens, as a multiple of bfloat16's speed."""
    lines: list[str] = []
    for entry in results["entries"]:
        if "products" not in entry:
            continue
        told = entry["products"]
        at = {(row["kind"], row["rows"]): row for row in told["results"]}
        rows = sorted({row["rows"] for row in told["results"]})
        lines += [f"{told['shape']}, {told['threads']} threads, {told['isa']}; `{entry['command']}`.", ""]
        lines += [
            f"| weights | bits a weight | {' | '.join(f'{n} token' + 's' * (n > 1) for n in rows)} |",
            "|---|---|" + "---|" * len(rows),
        ]
        parameters = at["bfloat16", rows[0]]["operations"] / 2 / rows[0]
        for kind in dict.fromkeys(row["kind"] for row in told["results"]):
            cells = [f"{at['bfloat16', n]['seconds'] / at[kind, n]['seconds']:.2f}x" for n in rows]
            lines.append(f"| {KINDS.get(kind, kind)} | {8 * at[kind, rows[0]]['bytes'] / parameters:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PLACES: dict[str, Callable[[dict[str, Any]], str]] = {"cost": costs, "speed": speeds}


def fill(page: str, results: dict[str, Any]) -> str:
    for name, table in PLACES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        head, _, rest = page.partition(begin)
        page = head + begin + table(results) + end + rest.partition(end)[2]
    return page


KINDS_OF_RUN = {"run": run, "serve": serve, "products": products}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.quantize_cost", description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file to keep the result in")
    parser.add_argument("--work", type=Path, help="the folder for what is made (default: the system's for temporary files)")
    parser.add_argument("--from", dest="source", type=Path, help="fill the page from such a file and do nothing else")
    parser.add_argument("what", nargs="?", choices=list(KINDS_OF_RUN))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of `minfer quantize`, without OUT; of `minfer serve`; of linear_bench")
    options = parser.parse_args()
    if options.source is not None:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(options.source.read_text())))
        return
    if options.what is None or not options.arguments:
        parser.error("run or serve and a model, or products and its flags")
    try:
        entry = KINDS_OF_RUN[options.what](options.arguments, options.work)
    except CompareError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(entry))
    if options.out is not None:
        keep(options.out, entry)


if __name__ == "__main__":
    main()
