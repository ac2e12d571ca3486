"""What a kernel is written differently for, from one GPU to another: the one place where CUDA and ROCm part.

nvidia: PTX may stand in a kernel. A warp has 32 lanes there and 64 on CDNA, a processor 163 KiB of shared memory or more and 64 of LDS:
tiles are chosen to fit both, and where one is better served by other tiles `tuning.json` says so.

fp8: the type of 8-bit floats that the matrix units multiply. sm_80 and CDNA2 have none, and CDNA3's e4m3 ("fnuz") has another bias
than the one that checkpoints come in: the same bits mean half as much, and those of -0 aren't a number. Where matrices of such floats
meet 16-bit rows they are taken apart bit by bit (`codes.py`), but on CDNA3, which converts two of its own in one instruction.

Under the interpreter nothing is NVIDIA's: it runs no assembly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.knobs

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Target:
    """`processors`: how many the device has, which decides how finely small work is split. `architecture`: cuda:90, hip:gfx942, ...
    `shared`: bytes of shared memory a program may have, which decides how large its tiles are: 227 KiB on Hopper and on Blackwell of its
    class, on others at least 64.
    """

    processors: int
    architecture: str = INTERPRETER
    shared: int = 64 * 1024

    @property
    def nvidia(self) -> bool:
        return self.architecture.startswith("cuda")

    @property
    def lifts(self) -> bool:
        """Whether 16-bit floats are added in pairs: CDNA has no such addition of bfloat16."""
        return not self.architecture.startswith("hip")

    @property
    def large_tiles(self) -> bool:
        """Whether shared memory holds what feeds a tile of 128 x 128 of unpacked numbers: Hopper's 227 KiB do."""
        return not self.architecture.startswith(("hip", "cuda:8"))

    @property
    def fp8(self) -> torch.dtype | None:
        kind, _, model = self.architecture.partition(":")
        if kind == "cuda":
            return torch.float8_e4m3fn if int(model) >= 89 else None
        if kind == "hip":
            return torch.float8_e4m3fnuz if model.startswith("gfx94") else torch.float8_e4m3fn if model.startswith("gfx95") else None
        return torch.float8_e4m3fn

    @property
    def converts_fnuz(self) -> bool:
        """Whether codes of e4m3 are best taken for the device's own and converted by it. The interpreter doesn't know the type."""
        return self.fp8 == torch.float8_e4m3fnuz and not triton.knobs.runtime.interpret

    @staticmethod
    def of(device: torch.device) -> Target:
        if device.type != "cuda" or triton.knobs.runtime.interpret:
            return Target(processors=4)  # the interpreter runs programs one by one; any small number keeps the paths of a GPU
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is None:
            shared = (227 if properties.major in (9, 10) else 64) * 1024
            return Target(properties.multi_processor_count, f"cuda:{properties.major}{properties.minor}", shared)
        return Target(properties.multi_processor_count, f"hip:{properties.gcnArchName.partition(':')[0]}")
