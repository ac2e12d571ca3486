"""What a kernel is written differently for, from one GPU to another: the one place where CUDA and ROCm part.

nvidia: PTX may stand in a kernel. A warp has 32 lanes there and 64 on CDNA, a processor 163 KiB of shared memory or more and 64 of LDS:
tiles are chosen to fit both. 8-bit floats are taken apart bit by bit on all (`codes.py`): sm_80 and CDNA2 have none, and CDNA3's e4m3
("fnuz") has another bias than the one that checkpoints come in.

Under the interpreter nothing is NVIDIA's: it runs no assembly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.knobs


@dataclass(frozen=True)
class Target:
    """`processors`: how many the device has, which decides how finely small work is split. `shared`: bytes of shared memory a program
    may have, which decides how large its tiles are: 227 KiB on Hopper and on Blackwell of its class, on others at least 64.
    """

    processors: int
    nvidia: bool = False
    shared: int = 64 * 1024

    @staticmethod
    def of(device: torch.device) -> Target:
        if device.type != "cuda" or triton.knobs.runtime.interpret:
            return Target(processors=4)  # the interpreter runs programs one by one; any small number keeps the paths of a GPU
        properties, nvidia = torch.cuda.get_device_properties(device), torch.version.hip is None
        return Target(properties.multi_processor_count, nvidia, (227 if nvidia and properties.major in (9, 10) else 64) * 1024)
