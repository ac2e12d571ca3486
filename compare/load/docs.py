"""`python -m compare.load.docs FOLDER`: the table of docs/operations.md, from the reports in a folder of results/."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
BEGIN, END = "<!-- load:begin -->\n", "<!-- load:end -->"


def table(folder: Path) -> str:
    """The reports' figures, with the commands that made them."""
    names = ("mixed", "endurance", "overload", "offline")
    mixed, long, over, off = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    last, speeds = over["levels"][-1], off["tokens_per_s"]
    rows = [
        *_crowd("mixed", mixed),
        *_crowd(f"mixed, a round every {long['every_s']:g} s, on a model that costs nothing", long),
        *_resources(long),
        ("overload", f"capacity, first token within {last['ttft_limit_s']:g} s", f"{over['capacity_per_s']:.1f} requests/s"),
        ("", f"goodput at {last['times_capacity']:.1f} times that, of its peak", f"{over['goodput_kept']:.1%}"),
        (
            "offline",
            f"{off['clients']} streams against `LLM.generate`, tokens/s",
            " / ".join(f"{_median(speeds[a]):,.0f}" for a in ("served", "offline")),
        ),
        ("", "served / offline", f"{off['served_to_offline']:.1%}"),
        ("", "idle server", f"{off['idle_cpu_share']:.1%} of a core"),
    ]
    where = (
        f"{mixed['model']} on {mixed['machine'].get('cpu', 'a CPU')}, {mixed['machine'].get('cores', '?')} cores, clients on the same cores"
    )
    commands = ", ".join(f"`{report['command']}`" for report in (mixed, long, over, off))
    lines = ["| experiment | what | result |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    return f"{where}.\n\n" + "\n".join(lines) + f"\n\nAgain: {commands}.\n"


def _crowd(name: str, report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What became of the requests of all rounds; latencies are those of the median round."""
    rounds = report["rounds"]
    endings = {kind: sum(r["endings"].get(kind, 0) for r in rounds) for kind in ("done", "left", "refused")}
    kinds = {key: {p: _median([r[key][p] for r in rounds]) for p in ("p50", "p99")} for key in ("ttft_s", "itl_s")}
    asked = sum(r["requests"] for r in rounds)
    return [
        (name, f"{asked:,} requests, {report['clients']} at a time", ", ".join(f"{count:,} {kind}" for kind, count in endings.items())),
        ("", "time to first token, p50 / p99", _pair(kinds["ttft_s"])),
        ("", "between tokens, p50 / p99", _pair(kinds["itl_s"])),
    ]


def _resources(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a long run's process holds after its first, its second and its last third."""
    thirds = report["medians_of_thirds"]
    held = {
        "resident memory": [f"{value / 1e6:,.0f} MB" for value in thirds["rss_bytes"]],
        "open files and sockets": [f"{value:.0f}" for value in thirds["open_files"]],
        "threads": [f"{value:.0f}" for value in thirds["threads"]],
    }
    left = max(value for each in report["rounds"] for value in each["gauges_after"].values())
    gauges = ("", "requests, queue and blocks in use after a round", f"{left:g}")
    return [gauges] + [("", f"{what}, first / middle / last third", " / ".join(values)) for what, values in held.items()]


def _pair(seconds: dict[str, float]) -> str:
    return f"{seconds['p50'] * 1000:,.0f} / {seconds['p99'] * 1000:,.0f} ms"


def _median(values: list[Any]) -> float:
    return float(sorted(values)[len(values) // 2])


def update(folder: Path) -> str:
    """The page with its table made anew."""
    return re.sub(f"(?<={BEGIN}).*(?={END})", lambda _: table(folder), PAGE.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(update(Path(sys.argv[1])))
