"""What `compare.quantization` compares: every way to quantise one unquantised folder, and how each checkpoint is made.

minfer's own come from `minfer quantize`, llama.cpp's from its own `llama_model_quantize`, in the environment that `python -m compare
setup llamacpp` makes, those of GPTQModel and llm-compressor from quantized_peers.py. All start from the same bf16 folder, so that nothing
differs but the method. A checkpoint that is there already is not made again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from compare.environments import venv_python
from compare.errors import CompareError
from compare.process import ROOT
from compare.quantized_peers import PEERS, make_peer
from minfer.quantize import read_calibration
from minfer.tokenizer import Tokenizer

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
ROWS = (*METHODS, *LLAMA_CPP, *PEERS)
ROUNDS_INPUTS = ("SmoothQuant",)  # rows whose inputs are rounded as they run, because that is the method

# Which rows are set against which: the difference is paired, window by window.
PAIRS: tuple[tuple[str, str], ...] = (
    ("GPTQ, 4 bits, groups of 32", "RTN, 4 bits, groups of 32"),
    ("GPTQ, 4 bits, groups of 64", "RTN, 4 bits, groups of 64"),
    ("GPTQ, 4 bits, a scale a row", "RTN, 4 bits, a scale a row"),
    ("GPTQ, 4 bits, groups of 64, zero points", "RTN, 4 bits, groups of 64, zero points"),
    ("AWQ, 4 bits, groups of 32, zero points", "RTN, 4 bits, groups of 32, zero points"),
    ("AWQ, 4 bits, groups of 64, zero points", "RTN, 4 bits, groups of 64, zero points"),
    ("GPTQ, 3 bits, groups of 64, zero points", "RTN, 3 bits, groups of 64, zero points"),
    ("AWQ, 3 bits, groups of 64, zero points", "RTN, 3 bits, groups of 64, zero points"),
    ("GPTQ, 4 bits, groups of 32", "llama.cpp Q4_0"),
    ("GPTQ, 4 bits, groups of 64", "llama.cpp Q4_0"),
    ("AWQ, 4 bits, groups of 32, zero points", "llama.cpp Q4_0"),
    ("AWQ, 4 bits, groups of 64, zero points", "llama.cpp Q4_0"),
    ("GPTQ, 4 bits, groups of 32", "llama.cpp Q4_K_M"),
    ("MXFP6 (E2M3)", "llama.cpp Q4_K_M"),
    ("RTN, 8 bits, a scale a row", "llama.cpp Q8_0"),
    ("GPTQ, 4 bits, groups of 32", "gptqmodel, 4 bits, groups of 32"),
    ("GPTQ, 4 bits, groups of 64", "gptqmodel, 4 bits, groups of 64"),
    ("GPTQ, 4 bits, groups of 32", "llm-compressor GPTQ, 4 bits, groups of 32"),
    ("GPTQ, 4 bits, groups of 64", "llm-compressor GPTQ, 4 bits, groups of 64"),
    ("AWQ, 4 bits, groups of 64, zero points", "llm-compressor AWQ, 4 bits, groups of 64, zero points"),
)


@dataclass(frozen=True)
class Calibration:
    """What the methods that need data are shown. file None: minfer's let the model write its own texts, the others have nothing."""

    file: Path | None
    samples: int
    seqlen: int

    @property
    def flags(self) -> list[str]:
        data = ["--calibration", str(self.file.resolve())] if self.file is not None else []
        return [*data, "--samples", str(self.samples), "--seqlen", str(self.seqlen)]

    def ids(self, weights: Path, into: Path) -> Path:
        """A JSON file of the very samples that `minfer quantize` takes from the text, made in the folder `into`."""
        if self.file is None:
            raise CompareError("other tools can't let the model write their samples; give --calibration")
        tokenizer = Tokenizer.from_folder(weights)
        found = read_calibration(self.file, lambda text: tokenizer.encode(text, add_special_tokens=False), self.samples, self.seqlen)
        file = into / f"calibration-{self.samples}x{self.seqlen}.json"
        file.write_text(json.dumps(found))
        return file


_PREPARE = """
import sys
from pathlib import Path
from compare.engines.llamacpp import LlamaCpp
LlamaCpp.prepare(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


def make(name: str, weights: Path, work: Path, data: Calibration) -> Path:
    """The checkpoint of one row, in a folder of its own below `work`. Raises CompareError with the tool's last words."""
    out = work / "".join(c if c.isalnum() else "-" for c in name.lower())
    if name in LLAMA_CPP:
        file = out / "model.gguf"
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            _run([str(venv_python("llamacpp")), "-c", _PREPARE, str(weights), LLAMA_CPP[name], str(out)], name)
        return file
    if (out / "config.json").exists():
        return out
    if name in PEERS:
        work.mkdir(parents=True, exist_ok=True)
        print(f"making {name}", file=sys.stderr)
        make_peer(name, weights, data.ids(weights, work), out)
        return out
    _run([sys.executable, "-m", "minfer", "quantize", str(weights), str(out), *shlex.split(METHODS[name]), *data.flags, "--json"], name)
    return out


def _run(command: list[str], name: str) -> None:
    """Raises CompareError with the command's last words."""
    if not Path(command[0]).exists():
        raise CompareError(f"{name} needs an environment that isn't there; `python -m compare setup llamacpp` makes it")
    print(f"making {name}", file=sys.stderr)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompareError(f"{name} could not be made: {(done.stderr or done.stdout).strip()[-500:]}")
