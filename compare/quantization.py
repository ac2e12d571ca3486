"""How good quantised checkpoints are: perplexity, divergence from the unquantised model, agreement, size.

    python -m compare.quantization MODEL --text FILE --out results/quantization.json NAME=CHECKPOINT ...
    python -m compare.quantization --page results/quantization.json > table.md

Every checkpoint, GGUF files included, is scored by minfer itself on the same windows of the text, with inputs left unrounded, so that
only the weights differ. KL is the coarse one over the 20 likeliest tokens of each position (measure.py), agreement the share of
positions whose likeliest token is the unquantised model's. Bits a weight count the decoder's matrices as they lie in the file,
scales included; embedding and head, which most tools leave alone, are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from compare import machine
from compare.errors import CompareError
from compare.measure import coarse_kl
from minfer import LLM, SamplingParams, __version__
from minfer.loader import open_checkpoint, resolve_model

TOP = 20
Row = list[dict[int, float]]  # per position, the likeliest tokens' log-probabilities and the true token's


def score(model: str, windows: list[list[int]] | None, text: str, size: int, count: int) -> tuple[list[list[int]], list[Row]]:
    """The windows (made with this model's tokenizer where None) and what the model says at every position of them."""
    llm = LLM(model=model, dtype="float32", activations="none", max_model_len=size + 1, max_num_batched_tokens=size, max_num_seqs=1)
    if windows is None:
        ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
        windows = [ids[n : n + size] for n in range(0, len(ids) - size + 1, size)][:count]
        if not windows:
            raise CompareError(f"the text holds {len(ids)} tokens, fewer than one window of {size}")
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
    rows: list[Row] = []
    for window in windows:
        (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
        assert output.prompt_logprobs is not None, "the request asked for them"
        rows.append([{token: item.logprob for token, item in at.items()} for at in output.prompt_logprobs if at is not None])
    return windows, rows


def figures(windows: list[list[int]], rows: list[Row], reference: list[Row]) -> dict[str, float]:
    likelihoods = [at[token] for window, row in zip(windows, rows, strict=True) for token, at in zip(window[1:], row, strict=True)]
    pairs = [pair for ours, theirs in zip(rows, reference, strict=True) for pair in zip(theirs, ours, strict=True)]
    return {
        "perplexity": math.exp(-statistics.fmean(likelihoods)),
        "kl": statistics.fmean(coarse_kl(theirs, ours) for theirs, ours in pairs),
        "agreement": statistics.fmean(max(t, key=t.__getitem__) == max(o, key=o.__getitem__) for t, o in pairs),
        "predictions": len(likelihoods),
    }


def size_of(model: str) -> dict[str, float]:
    checkpoint = open_checkpoint(resolve_model(model))
    matrices = [info for name, info in checkpoint.tensor_infos.items() if name.endswith("_proj.weight")]
    return {
        "bytes": sum(info.num_bytes for info in checkpoint.tensor_infos.values()),
        "bits_per_weight": 8 * sum(info.num_bytes for info in matrices) / sum(math.prod(info.shape) for info in matrices),
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| weights | bits a weight | MB | perplexity | KL | agreement |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        size = f"{row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.0f}"
        lines.append(f"| {row['name']} | {size} | {row['perplexity']:.2f} | {row['kl']:.4f} | {row['agreement']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.quantization", description=__doc__)
    parser.add_argument("model", nargs="?", help="the unquantised model")
    parser.add_argument("checkpoints", nargs="*", help="NAME=FOLDER or GGUF file")
    parser.add_argument("--text", type=Path, help="a UTF-8 text that nothing was calibrated on")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="print the table of an earlier run and do nothing else")
    options = parser.parse_intermixed_args()
    if options.page is not None:
        print(table(json.loads(options.page.read_text())))
        return
    if options.model is None or options.text is None or options.out is None:
        parser.error("MODEL, --text and --out are needed")
    text = options.text.read_text(encoding="utf-8")
    windows, reference = score(options.model, None, text, options.window, options.windows)
    rows = [{"name": "the source", **size_of(options.model), **figures(windows, reference, reference)}]
    for item in options.checkpoints:
        name, separator, path = item.partition("=")
        if not separator:
            parser.error(f"{item!r} is not NAME=CHECKPOINT")
        _, scored = score(path, windows, text, options.window, options.windows)
        rows.append({"name": name, **size_of(path), **figures(windows, scored, reference)})
        print(rows[-1], file=sys.stderr)
    command = ["python", "-m", "compare.quantization", options.model, "--text", options.text.name]
    about = {"minfer": __version__, "machine": machine.describe(), "window": options.window, "windows": len(windows)}
    options.out.write_text(json.dumps({"command": command, **about, "rows": rows}, indent=1) + "\n")
    print(table({"rows": rows}))


if __name__ == "__main__":
    main()
