"""How good quantised checkpoints are: perplexity, divergence from the unquantised model, agreement, size.

    python -m compare.quantization --text test.txt --calibration valid.txt --work FOLDER --out results/quantization.json
    python -m compare.quantization --from results/quantization.json

makes every checkpoint of quantized.py and scores it; `--only WORD` takes the row of that name, or those whose name contains it, and
NAME=CHECKPOINT adds one that was made elsewhere. Rows of an earlier run with the same text and windows are kept, so the work can be
done in pieces. A tool that fails costs its own row, and its last words are kept in its place. The second form fills
docs/quantization.md from the file alone.

All are scored by minfer itself, GGUF files included, on the same windows of the text, in float32 and with inputs left unrounded, so that
only the weights differ (where rounding the inputs is the method, they are rounded). KL is the coarse one over the 20 likeliest
tokens of each position (measure.py), agreement the share of positions whose likeliest token is the unquantised model's. Every
difference is paired: of the same windows, with the standard error of the mean over windows. Bits a weight count the decoder's
matrices as they lie in the file, scales included; embedding and head, which most tools leave alone, are not in it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from compare import machine
from compare.ablation import ROOT, fill
from compare.errors import CompareError
from compare.measure import coarse_kl
from compare.places import without_paths
from compare.quantized import PAIRS, ROUNDS_INPUTS, ROWS, Calibration, make
from compare.weights import get_weights
from minfer import LLM, SamplingParams, __version__
from minfer.loader import open_checkpoint, resolve_model

PAGE = ROOT / "docs" / "quantization.md"
TOP = 20
SOURCE = "bfloat16, the source"
Row = list[dict[int, float]]  # per position, the likeliest tokens' log-probabilities and the true token's


def score(model: str, windows: list[list[int]], *, activations: str = "none", threads: int | None = None) -> list[Row]:
    """What the model says at every position of every window."""
    size = max(map(len, windows))
    llm = LLM(
        model=model,
        dtype="float32",
        activations=activations,
        threads=threads,
        max_model_len=size + 1,
        max_num_batched_tokens=size,
        max_num_seqs=1,
        kv_cache_memory=2**28,
        prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
    rows: list[Row] = []
    for window in windows:
        (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
        assert output.prompt_logprobs is not None, "the request asked for them"
        rows.append([{token: item.logprob for token, item in at.items()} for at in output.prompt_logprobs if at is not None])
    return rows


def cut(model: str, text: str, size: int, count: int) -> list[list[int]]:
    """The first `count` whole windows of the text."""
    from minfer.tokenizer import Tokenizer

    tokens = open_checkpoint(resolve_model(model)).tokenizer_source
    if not isinstance(tokens, Path):
        raise CompareError(f"{model} must be a folder with a tokenizer")
    ids = Tokenizer.from_folder(tokens).encode(text, add_special_tokens=False)
    windows = [ids[n : n + size] for n in range(0, len(ids) - size + 1, size)][:count]
    if not windows:
        raise CompareError(f"the text holds {len(ids)} tokens, fewer than one window of {size}")
    return windows


def figures(windows: list[list[int]], rows: list[Row], reference: list[Row]) -> dict[str, Any]:
    """`window_nll`, `window_kl`: the mean of each window, from which every comparison is made."""
    nll = [-statistics.fmean(at[token] for token, at in zip(w[1:], row, strict=True)) for w, row in zip(windows, rows, strict=True)]
    pairs = [list(zip(theirs, ours, strict=True)) for ours, theirs in zip(rows, reference, strict=True)]
    kl = [statistics.fmean(coarse_kl(theirs, ours) for theirs, ours in window) for window in pairs]
    same = [max(t, key=t.__getitem__) == max(o, key=o.__getitem__) for window in pairs for t, o in window]
    return {
        "perplexity": math.exp(statistics.fmean(nll)),
        "kl": statistics.fmean(kl),
        "agreement": statistics.fmean(same),
        "predictions": len(same),
        "window_nll": nll,
        "window_kl": kl,
    }


def size_of(model: str) -> dict[str, float]:
    checkpoint = open_checkpoint(resolve_model(model))
    matrices = [info for name, info in checkpoint.tensor_infos.items() if name.endswith("_proj.weight")]
    return {
        "bytes": sum(info.num_bytes for info in checkpoint.tensor_infos.values()),
        "bits_per_weight": 8 * sum(info.num_bytes for info in matrices) / sum(math.prod(info.shape) for info in matrices),
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error; windows are independent enough, neighbouring tokens are not."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """How much higher the perplexity of `a` is than that of `b`, as a share, and the standard error of that."""
    mean, error = mean_and_error([x - y for x, y in zip(a["window_nll"], b["window_nll"], strict=True)])
    return math.expm1(mean), math.exp(mean) * error


def tables(results: dict[str, Any]) -> str:
    """Every row against the source, and the pairs that are to be compared."""
    rows = {row["name"]: row for row in results["rows"]}
    source, first = rows[SOURCE], results["rows"][0]
    lines = [
        f"{results['model']}; the first {results['windows']} windows of {results['window']} tokens of {results['text']['name']}, "
        f"{first['predictions']:,} predictions; calibrated on {results['calibration']}; `{' '.join(results['command'])}`.",
        "",
        "| weights | bits a weight | MB | perplexity | against the source | KL | agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        size = f"{row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.0f}"
        kl, error = mean_and_error(row["window_kl"])
        quality = "| | 100% |" if name == SOURCE else f"{_change(row, source)} | {kl:.4f} ± {error:.4f} | {row['agreement']:.1%} |"
        lines.append(f"| {name} | {size} | {row['perplexity']:.2f} | {quality}")
    known = [(a, b) for a, b in PAIRS if a in rows and b in rows]
    if known:
        lines += ["", "| | bits | set against | bits | perplexity | KL |", "|---|---|---|---|---|---|"]
    for a, b in known:
        bits = [f"{rows[name]['bits_per_weight']:.2f}" for name in (a, b)]
        lines.append(f"| {a} | {bits[0]} | {b} | {bits[1]} | {_change(rows[a], rows[b])} | {rows[a]['kl'] / rows[b]['kl']:.2f}x |")
    failed = results.get("failed", {})
    if failed:
        lines += ["", "| tried | what it said |", "|---|---|"]
        lines += [f"| {name} | `{' '.join(words.split()).replace('|', '/').replace('`', chr(39))}` |" for name, words in failed.items()]
    return "\n".join(lines) + "\n"


def _change(a: dict[str, Any], b: dict[str, Any]) -> str:
    share, error = difference(a, b)
    return f"{100 * share:+.2f}% ± {100 * error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.quantization", description=__doc__)
    parser.add_argument("checkpoints", nargs="*", help="NAME=FOLDER or GGUF file: one more row")
    parser.add_argument("--model", default="smollm2-135m", help="the unquantised model: a name of compare/weights.py or an HF folder")
    parser.add_argument("--text", type=Path, help="a UTF-8 text that nothing was calibrated on")
    parser.add_argument("--calibration", type=Path, help="a text to calibrate on (default: the model's own samples)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--work", type=Path, help="the folder for the checkpoints")
    parser.add_argument(
        "--only", action="append", help="make and score the row of this name, or those that contain it; several in this order"
    )
    parser.add_argument("--threads", type=int, help="of scoring; quantising takes OMP_NUM_THREADS")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="fill the page from an earlier run's file and do nothing else")
    options = parser.parse_intermixed_args()
    if options.source is not None:
        PAGE.write_text(fill(PAGE.read_text(), tables(json.loads(options.source.read_text()))))
        print(f"{options.source} -> {PAGE}")
        return
    if options.text is None or options.out is None or options.work is None:
        parser.error("--text, --work and --out are needed")
    try:
        measure(options)
    except CompareError as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> None:
    weights = get_weights(options.model).folder
    text = options.text.read_text(encoding="utf-8")
    windows = cut(str(weights), text, options.window, options.windows)
    results = _begin(options, text, len(windows))
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in results["rows"]}
    reference = score(str(weights), windows, threads=options.threads)
    rows[SOURCE] = {"name": SOURCE, **size_of(str(weights)), **figures(windows, reference, reference)}
    data = Calibration(options.calibration, options.samples, options.seqlen)
    extra = _named(options.checkpoints)
    chosen = [name for word in options.only or [""] for name in ((word,) if word in ROWS else ROWS) if word in name]
    for name in dict.fromkeys([*chosen, *extra]):
        try:
            path = str(extra.get(name) or make(name, weights, options.work.resolve(), data))
        except CompareError as error:
            print(error, file=sys.stderr)
            results["failed"][name] = without_paths(str(error).removeprefix(f"{name} could not be made: "))
            _write(options.out, results, rows)
            continue
        scored = score(path, windows, activations="int8" if name.startswith(ROUNDS_INPUTS) else "none", threads=options.threads)
        rows[name] = {"name": name, **size_of(path), **figures(windows, scored, reference)}
        del scored
        gc.collect()
        shown = {key: value for key, value in rows[name].items() if not key.startswith("window")}
        print(shown, file=sys.stderr)
        results["failed"].pop(name, None)
        _write(options.out, results, rows)


def _write(out: Path, results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    order = [SOURCE, *ROWS]
    kept = sorted(rows.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    out.write_text(json.dumps({**results, "rows": kept}, indent=1) + "\n")


def _begin(options: argparse.Namespace, text: str, windows: int) -> dict[str, Any]:
    """What the file says of the run, with the rows of an earlier one of the same kind."""
    command = ["python", "-m", "compare.quantization", "--text", "FILE", "--work", "FOLDER", "--out", "FILE"]
    command += ["--calibration", "FILE"] if options.calibration is not None else []
    command += f"--samples {options.samples} --seqlen {options.seqlen} --window {options.window} --windows {options.windows}".split()
    what = options.calibration.name if options.calibration is not None else "the model's own texts"
    results: dict[str, Any] = {
        "command": command,
        "minfer": __version__,
        "machine": machine.describe(),
        "model": options.model,
        "text": {"name": options.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "calibration": f"{options.samples} x {options.seqlen} tokens of {what}",
        "window": options.window,
        "windows": windows,
        "rows": [],
        "failed": {},
    }
    if options.out.exists():
        earlier = json.loads(options.out.read_text())
        if any(earlier.get(key) != results[key] for key in ("model", "text", "calibration", "window", "windows")):
            raise CompareError(f"{options.out} holds another comparison; give another file")
        results |= {"rows": earlier["rows"], "failed": earlier.get("failed", {})}
    return results


def _named(items: list[str]) -> dict[str, str]:
    found = dict(item.partition("=")[::2] for item in items)
    if not all(found.values()):
        raise CompareError(f"rows that are added are given as NAME=CHECKPOINT, not {', '.join(items)}")
    return found


if __name__ == "__main__":
    main()
