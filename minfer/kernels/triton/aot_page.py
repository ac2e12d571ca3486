"""docs/kernels-gpu.md, written from budgets.json by `python -m minfer.kernels.triton.aot --update`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PAGE = Path(__file__).parents[3] / "docs" / "kernels-gpu.md"
_INTRO = """\
# GPU kernels, as compiled

Made by `python -m minfer.kernels.triton.aot --update` from `minfer/kernels/triton/budgets.json`; `make test` compiles everything
again and fails where the result differs. Triton {version}; bfloat16, shapes of llama3.1-8b unless the kernel's name says otherwise;
mixtures of experts (moe) are of Qwen3-30B-A3B's shape.
It shows what the compilers made of the kernels, **not how fast they are**: nothing here ran on a GPU.

- *registers* a thread; on AMD vector registers, accumulation registers included. No kernel spills any.
- *shared* KiB a program; there are 163 on sm_80, 227 on sm_90, 64 on gfx90a and gfx942.
- *matrix*: the matrix instructions that `tl.dot` became.
- *loop*: instructions in the longest innermost loop. Of the products with codes, a turn of it does 4 (int4, nf4) or 2 parts of each
  16-bit word.
- *loads* from global memory: bytes a thread x how many such instructions stand in the code.
"""


def render(budget: dict[str, Any]) -> str:
    lines = [_INTRO.format(version=budget["triton"])]
    for target in ("cuda:90", "cuda:80", "hip:gfx942", "hip:gfx90a"):
        lines += [f"## {target}", "", "| kernel | warps | registers | shared | loop | matrix | loads |", "|---|---|---|---|---|---|---|"]
        for label in sorted(budget["kernels"]):
            if target not in budget["kernels"][label]:
                continue  # a kernel for what this target doesn't have
            r = budget["kernels"][label][target]
            loads = ", ".join(f"{width} x {r['loads'][width]}" for width in sorted(r["loads"], key=int, reverse=True))
            matrix = ", ".join(r["matrix"])
            lines.append(
                f"| {label} | {r['warps']} | {r['registers']} | {r['shared'] / 1024:.1f} | {r['loop'] or ''} | {matrix} | {loads} |"
            )
        lines.append("")
    return "\n".join(lines)


def write_page(budget: dict[str, Any]) -> None:
    _PAGE.write_text(render(budget))
