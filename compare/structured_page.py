"""`python -m compare.structured_page FOLDER`: the tables of docs/structured-output.md, from the reports in a folder of results/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compare.structured import cost_table, table

PAGE = Path(__file__).parents[1] / "docs" / "structured-output.md"


def update(folder: Path) -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text()
    for name in ("coverage", "cost"):
        report = json.loads((folder / f"{name}.json").read_text())
        made = table(report["summary"]) if name == "coverage" else cost_table(report)
        where = f"{report['model']} on {report['machine'].get('cpu', 'a CPU')}, {report['machine'].get('cores', '?')} cores"
        new = f"<!-- {name}:begin -->\n{where}: `{report['command']}`.\n\n{made}\n<!-- {name}:end -->"
        before, _, rest = text.partition(f"<!-- {name}:begin -->")
        text = before + new + rest.partition(f"<!-- {name}:end -->")[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(update(Path(sys.argv[1])))
