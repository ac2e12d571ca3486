"""The house rules that can be checked: floors, torch-free control code, core dependencies, and a truthful architecture page."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minfer"

# From the ground up; a room imports only from rooms that stand before it.
ROOMS = [
    "errors",
    "config",
    "model_config",
    "structured_outputs",
    "sampling_params",
    "batch",
    "kvcache",
    "quant",
    "kernels",
    "loader",
    "tokenizer",
    "layers",
    "models",
    "quantize",
    "runner",
    "sampling",
    "guided",
    "scheduler",
    "speculative",
    "engine",
    "training",
    "server",
    "cli",
]
CORE = {"torch", "numpy", "safetensors", "tokenizers"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path) -> list[str]:
    """Every module a file imports, wherever the statement stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_room_is_on_the_list() -> None:
    rooms = {room_of(module_of(file)) for file in files()} - {"", "__main__"}
    assert rooms == set(ROOMS) & rooms
    assert not rooms - set(ROOMS)


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_below_it(file: Path) -> None:
    own = room_of(module_of(file))
    if own in ("", "__main__"):
        return  # the package's face names the public classes
    for module in imports_of(file):
        if module.startswith("minfer.") and room_of(module) in ROOMS:
            assert ROOMS.index(room_of(module)) <= ROOMS.index(own), f"{own} must not import {module}"
        assert not module.startswith("compare"), "the engine knows nothing of the comparison"


@pytest.mark.parametrize("file", sorted((PACKAGE / "scheduler").glob("*.py")), ids=lambda f: f.name)
def test_control_code_has_no_torch(file: Path) -> None:
    assert not any(module.split(".")[0] in ("torch", "numpy") for module in imports_of(file))


def test_importing_every_module_needs_only_the_core_dependencies() -> None:
    """In a process where nothing else can be imported. A module that needs an extra imports it where it is used."""
    allowed = ["cli", "server"]  # these rooms *are* extras
    modules = [module_of(f) for f in files() if room_of(module_of(f)) not in allowed and f.name != "__main__.py"]
    modules = [m for m in modules if not m.startswith("minfer.kernels.triton")]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, numpy, safetensors.torch, tokenizers  # with all that they bring along
extras = {{"typer", "click", "rich", "jinja2", "gguf", "huggingface_hub", "sentencepiece", "fastapi", "starlette", "uvicorn", "pydantic",
          "prometheus_client", "httpx", "llguidance", "jsonschema", "triton", "transformers", "openai"}}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras and name not in sys.modules:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_minfer_does_no_work() -> None:
    """No torch, no files, no devices: what costs time is imported when a name is first used."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import minfer; print('torch' in sys.modules, len(dir(minfer)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


def test_every_file_and_name_in_the_architecture_page_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    source = "\n".join(file.read_text() for file in files())
    paths = set(re.findall(r"`((?:minfer|compare|tests|docs|examples)/[\w./-]*)`", text))
    names = set(re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", text))
    assert len(paths) > 20 and len(names) > 20, "the page should name files and classes"
    missing = [path for path in paths if not (ROOT / path).exists()]
    for name in names:
        for part in name.split("."):
            if not re.search(rf"\b{re.escape(part)}\b", source) and not (PACKAGE / f"{part}.py").exists():
                missing.append(name)
    assert not missing, f"docs/architecture.md names what isn't there: {sorted(set(missing))}"
