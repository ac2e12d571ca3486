from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import minfer as package

COMMANDS = ["generate", "chat", "serve", "bench", "perplexity", "inspect", "fit", "list", "pull", "show", "rm", "ps", "env", "doctor"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(package.__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120, check=False)


def test_help_names_every_command(minfer: Callable) -> None:
    ran = minfer("--help")
    assert ran.code == 0
    assert all(f" {name} " in ran.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_help(minfer: Callable, name: str) -> None:
    ran = minfer(name, "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert "--verbose" in ran.out


def test_help_does_not_load_what_is_heavy() -> None:
    """The number of seconds depends on the machine; what is imported does not."""
    ran = python(
        "import sys; from minfer.cli import main; code = main(['--help'])\n"
        "heavy = [m for m in ('torch', 'numpy', 'fastapi', 'uvicorn', 'transformers', 'tokenizers') if m in sys.modules]\n"
        "print('HEAVY', heavy); sys.exit(code)"
    )
    assert ran.returncode == 0, ran.stderr
    assert "HEAVY []" in ran.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_extra_is_named_when_it_is_not_installed(missing: str) -> None:
    ran = python(f"import sys; sys.modules[{missing!r}] = None; from minfer.cli import main; sys.exit(main(['list']))")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert 'pip install "minfer[cli]"' in ran.stderr


def test_version(minfer: Callable) -> None:
    ran = minfer("--version")
    assert (ran.code, ran.out) == (0, f"minfer {package.__version__}\n")


def test_no_command_shows_the_help(minfer: Callable) -> None:
    ran = minfer()
    assert ran.code == 2
    assert "generate" in ran.out + ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "Missing argument"),
        (["generate", "m", "--nope"], "--nope"),
        (["generate", "m", "hi", "--max-tokens", "x"], "--max-tokens"),
        (["bogus"], "bogus"),
        (["bench", "m", "--repeats", "0"], "--repeats"),
    ],
)
def test_usage_errors(minfer: Callable, arguments: list[str], message: str) -> None:
    ran = minfer(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    ran = minfer(*arguments, "--json")
    assert ran.code == 2
    assert message in ran.json["error"]["message"]


def test_module_and_unknown_model_in_a_process_of_its_own() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "minfer", "generate", "no-such-model", "hi", "--json"],
        capture_output=True,
        text=True,
        cwd=Path(package.__file__).parents[1],
        timeout=300,
        check=False,
    )
    assert ran.returncode == 2
    assert '"type": "ModelLoadError"' in ran.stdout
    assert "no-such-model" in ran.stderr
    assert "Traceback" not in ran.stderr
