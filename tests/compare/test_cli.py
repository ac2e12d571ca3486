"""What the command line records, and that its lists can be read on a narrow terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from compare.cli import app, public_command
from compare.places import cache_root, without_paths


def test_the_recorded_command_has_no_path_of_this_machine() -> None:
    asked = ["--against", "vllm,openai=http://h/v1", "--out", "/home/me/x", "--text", "/data/test.txt", "--model=/m/tiny", "--resume=/r"]
    assert public_command(asked) == "python -m compare --against vllm,openai=http://h/v1 --text test.txt --model=tiny"


def test_messages_lose_the_folders_of_this_machine() -> None:
    text = without_paths(f"pip failed (whole log: {cache_root()}/vllm/setup.log), see {Path.cwd()}/results")
    assert text == "pip failed (whole log: CACHE/vllm/setup.log), see ./results"


def test_the_list_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = CliRunner().invoke(app, ["list", "--device", "cpu"]).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith("llamacpp ") for line in lines)
    assert lines[0].startswith("runs here")
    assert max(sum(not c.isspace() for c in line) for line in lines) > 20, "words are not cut into columns of letters"
