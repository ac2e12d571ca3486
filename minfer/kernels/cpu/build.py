"""Builds the compiled kernels of a source tree: `python -m minfer.kernels.cpu.build [--sanitize KIND] [-D...]`.

`pip install` does the same through scikit-build-core; this is for working on the kernels without reinstalling. CMake is
the only description of the build, so it is needed here too (pip's `cmake` package will do).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from minfer.kernels.cpu.library import FILE_NAME

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]


def build(sanitize: str = "", output: Path | None = None, jobs: int = 1) -> Path:
    """Configures and compiles; puts the library beside this file or into `output`. Returns its path."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("cmake was not found: install it (`pip install cmake` works too) and run this again")
    if not (_ROOT / "CMakeLists.txt").exists():
        raise SystemExit(f"{_ROOT} is not a source tree of minfer; reinstall minfer to build its kernels")
    folder = _ROOT / "build" / ("cpu" + ("-" + sanitize.replace(",", "-") if sanitize else ""))
    subprocess.run([cmake, "-S", _ROOT, "-B", folder, f"-DMINFER_SANITIZE={sanitize}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", folder, "--parallel", str(jobs)], check=True)
    built = next(folder.rglob(FILE_NAME), None)
    if built is None:
        raise SystemExit("no C++ compiler was found: install g++ or clang++ and run this again")
    target = (output or _HERE) / FILE_NAME
    # A running process keeps the old file mapped: replace it, never write into it.
    shutil.copy2(built, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m minfer.kernels.cpu.build", description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", default="", help="address,undefined or thread: an instrumented build, for tests")
    parser.add_argument("--output", type=Path, help="folder for the library (default: beside this file)")
    parser.add_argument("--jobs", type=int, default=1, help="compilers that run at the same time")
    options = parser.parse_args()
    print(build(options.sanitize, options.output, options.jobs), file=sys.stderr)
