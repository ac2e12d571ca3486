from __future__ import annotations

from pathlib import Path

from minfer.cli.loading_page import page


def test_the_page_of_formats_is_the_one_the_readers_make() -> None:
    written = (Path(__file__).parents[2] / "docs" / "loading.md").read_text()
    assert written == page(), "run `python -m minfer.cli.loading_page > docs/loading.md`"
