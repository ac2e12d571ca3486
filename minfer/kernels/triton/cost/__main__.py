"""`python -m minfer.kernels.triton.cost`: compiles, predicts, and writes the results and the page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minfer.kernels.triton.cost", description="Predicts kernels' times without a GPU.")
    parser.add_argument("--family", nargs="*", help="which to predict (default: all); none named: only the page is made again")
    parser.add_argument("--only", default="", help="cases whose name contains this; printed, nothing is written")
    parser.add_argument("--print-json", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument("--output", type=Path, help="write one family's predictions there, and no page")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("under TRITON_INTERPRET there is nothing to compile: unset it")
    from minfer.kernels.triton.cost.families import FAMILIES
    from minfer.kernels.triton.cost.report import RESULTS, Compiler, predict_family, write, write_page

    names = list(FAMILIES) if options.family is None else options.family
    if unknown := [name for name in names if name not in FAMILIES]:
        sys.exit(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    compiler = Compiler()
    for name in names:
        result = predict_family(FAMILIES[name], compiler, options.only)
        if options.print_json:
            print(json.dumps(result))
            continue
        for row in result["cases"]:
            main_launch = max(row["launches"], key=lambda entry: float(entry["predicted_us"]))
            print(
                f"{row['case']:46} {row['device']:15} {row['predicted_us']:9.1f} us, {row['share']:4.0%} of the floor, {row['bound']};"
                f" {main_launch['registers']} registers, {main_launch['resident']} resident, turn {main_launch['turn_cycles']}"
                f" {main_launch['busy']}"
            )
        for check in result["checks"]:
            print(f"check: {check['case']}: {check['predicted_us']} of {check['published_us']} us: {check['ratio']}")
        if not options.only:
            write(result, options.output or RESULTS / f"predicted-{name}.json")
    if not (options.only or options.output or options.print_json):
        write_page(list(FAMILIES.values()))


if __name__ == "__main__":
    main()
