"""What `compare.quantization` compares: every way to quantise one unquantised folder, and how each checkpoint is made.

minfer's own come from `minfer quantize`, llama.cpp's from its own `llama_model_quantize`, in the environment that `python -m compare
setup llamacpp` makes. Both start from the same bf16 folder, so that nothing differs but the method. A checkpoint that is there
already is not made again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from compare.environments import venv_python
from compare.errors import CompareError
from compare.process import ROOT

# The row's name: what `minfer quantize` is told. Groups of 128 are missing because 576, SmolLM2's width, isn't divided by 128.
METHODS: dict[str, str] = {
    "RTN, 4 bits, groups of 32": "--method rtn --group-size 32",
    "RTN, 4 bits, groups of 32, zero points": "--method rtn --group-size 32 --asym",
    "GPTQ, 4 bits, groups of 32": "--method gptq --group-size 32",
    "AWQ, 4 bits, groups of 32, zero points": "--method awq --group-size 32",
    "RTN, 4 bits, groups of 64": "--method rtn --group-size 64",
    "RTN, 4 bits, groups of 64, zero points": "--method rtn --group-size 64 --asym",
    "GPTQ, 4 bits, groups of 64": "--method gptq --group-size 64",
    "GPTQ, 4 bits, groups of 64, zero points": "--method gptq --group-size 64 --asym",
    "AWQ, 4 bits, groups of 64, zero points": "--method awq --group-size 64",
    "RTN, 4 bits, a scale a row": "--method rtn --group-size -1",
    "GPTQ, 4 bits, a scale a row": "--method gptq --group-size -1",
    "RTN, 3 bits, groups of 64, zero points": "--method rtn --bits 3 --group-size 64 --asym",
    "GPTQ, 3 bits, groups of 64, zero points": "--method gptq --bits 3 --group-size 64 --asym",
    "AWQ, 3 bits, groups of 64, zero points": "--method awq --bits 3 --group-size 64",
    "NF4, blocks of 64": "--method nf4",
    "NVFP4": "--method nvfp4",
    "MXFP4": "--method mxfp4",
    "MXFP6 (E2M3)": "--method mxfp6",
    "MXFP8 (E4M3)": "--method mxfp8",
    "FP8 (E4M3), a scale a row": "--method fp8",
    "FP8 (E4M3), a scale a matrix": "--method fp8-static",
    "RTN, 8 bits, a scale a row": "--method rtn --bits 8 --group-size -1",
    "SmoothQuant, 8 bits, inputs too": "--method smoothquant",
}
LLAMA_CPP: dict[str, str] = {"llama.cpp Q4_0": "int4", "llama.cpp Q4_K_M": "q4_k_m", "llama.cpp Q8_0": "int8"}
ROUNDS_INPUTS = ("SmoothQuant",)  # rows whose inputs are rounded as they run, because that is the method

# Which rows are set against which: the difference is paired, window by window.
PAIRS: tuple[tuple[str, str], ...] = (
    ("GPTQ, 4 bits, groups of 32", "RTN, 4 bits, groups of 32"),
    ("GPTQ, 4 bits, groups of 64", "RTN, 4 bits, groups of 64"),
    ("GPTQ, 4 bits, a scale a row", "RTN, 4 bits, a scale a row"),
    ("AWQ, 4 bits, groups of 32, zero points", "RTN, 4 bits, groups of 32, zero points"),
    ("AWQ, 4 bits, groups of 64, zero points", "RTN, 4 bits, groups of 64, zero points"),
    ("AWQ, 3 bits, groups of 64, zero points", "RTN, 3 bits, groups of 64, zero points"),
    ("GPTQ, 4 bits, groups of 32", "llama.cpp Q4_0"),
    ("GPTQ, 4 bits, groups of 64", "llama.cpp Q4_0"),
    ("AWQ, 4 bits, groups of 32, zero points", "llama.cpp Q4_0"),
    ("AWQ, 4 bits, groups of 64, zero points", "llama.cpp Q4_0"),
    ("RTN, 8 bits, a scale a row", "llama.cpp Q8_0"),
)

_PREPARE = """
import sys
from pathlib import Path
from compare.engines.llamacpp import LlamaCpp
LlamaCpp.prepare(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


def make(name: str, weights: Path, work: Path, data: list[str]) -> Path:
    """The checkpoint of one row, in a folder of its own below `work`. `data`: flags of `minfer quantize` on calibration."""
    out = work / "".join(c if c.isalnum() else "-" for c in name.lower())
    if name in LLAMA_CPP:
        file = out / "model.gguf"
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            _run([str(venv_python("llamacpp")), "-c", _PREPARE, str(weights), LLAMA_CPP[name], str(out)], name)
        return file
    if not (out / "config.json").exists():
        flags = shlex.split(METHODS[name])
        _run([sys.executable, "-m", "minfer", "quantize", str(weights), str(out), *flags, *data, "--json"], name)
    return out


def _run(command: list[str], name: str) -> None:
    """Raises CompareError with the command's last words."""
    if not Path(command[0]).exists():
        raise CompareError(f"{name} needs an environment that isn't there; `python -m compare setup llamacpp` makes it")
    print(f"making {name}", file=sys.stderr)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompareError(f"{name} could not be made: {(done.stderr or done.stdout).strip()[-500:]}")
