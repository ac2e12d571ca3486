from __future__ import annotations

from pathlib import Path

from minfer.cli.settings_page import page


def test_the_page_of_settings_is_the_one_the_fields_make() -> None:
    written = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert written == page(), "run `python -m minfer.cli.settings_page > docs/settings.md`"
