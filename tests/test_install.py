"""Installing where there is no C++ compiler: it succeeds, plain torch does the work, and the user is told once what that costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# CMake looks for compilers in the system's folders whatever PATH says; naming one that isn't there is what hides them all.
NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
SOURCES = {"abi.h", "pool.cpp", "linear_tile.h", "CMakeLists.txt"}


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def build(kind: str, folder: Path) -> str:
    """What pip does for a wheel or an sdist, without its isolated environment, which would need a network."""
    pytest.importorskip("scikit_build_core")
    code = f"from scikit_build_core.build import build_{kind} as build; build({str(folder)!r}, {{'build-dir': {str(folder / 'b')!r}}})"
    return run(sys.executable, "-c", code, **NO_COMPILER)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    assert "installing without compiled CPU kernels" in build("wheel", folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_python_only(wheel: Path) -> None:
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("minfer/kernels/cpu/")}
    assert {"library.py", "weights.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h", ".txt"))]


def test_the_wheel_holds_the_page(wheel: Path) -> None:
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("minfer/server/page/static/")}
    assert names == {file.name for file in (ROOT / "minfer/server/page/static").iterdir()}


def test_what_was_installed_runs_on_plain_torch_and_says_so_once(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        # Neither this source tree nor an installed minfer (editable ones install a finder) may answer in its place.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import logging, torch; logging.basicConfig()\n"
        "import minfer.kernels.cpu.library as library; library.sysconfig.get_path = lambda kind: '/nonexistent'\n"
        "from minfer.kernels import select_ops\n"
        "for _ in range(2): ops = select_ops(torch.device('cpu'), torch.float32)\n"
        "print(library.__file__, set(ops.chosen.values()))"
    )
    out = run(sys.executable, "-c", code)
    assert f"{tmp_path}/minfer/kernels/cpu/library.py {{'reference'}}" in out
    assert out.count("using plain torch, which is several times slower") == 1


def test_sources_are_in_the_sdist(tmp_path: Path) -> None:
    build("sdist", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {Path(name).name for name in archive.getnames() if "/minfer/kernels/cpu/" in name}
    assert names >= SOURCES
