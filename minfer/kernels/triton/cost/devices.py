"""The GPUs that kernels are judged for, and where each number is from.

Sheets: NVIDIA's A100, H100 and H200 data sheets and architecture white papers, AMD's MI300X data sheet and CDNA 3 white paper. `clock` is
the one at which processors x operations a cycle give the sheet's peak. Registers, warps and shared memory: the tables of compute
capabilities in the CUDA programming guide; for CDNA 3 the ISA guide.

Measured by others:
    `read_bandwidth`   Azure's AI benchmarking guide, "HBM bandwidth, Dot", on ND A100 v4, H100 v5, H200 v5, MI300X v5 (the best of
                       its five kernels there): 1.75, 3.18, 4.48, 4.26 TB/s of 2.04, 3.35, 4.8, 5.3
    `legacy_matrix`    mma.sync on Hopper reaches 62.9% of the peak, which is wgmma's: arXiv:2402.13499
    latencies          arXiv:2501.12084 and arXiv:2402.13499 (Hopper, Ampere); AMD's own model of MI300X has 254 cycles for a hit in L2

Assumed, for want of a source: `l2_bandwidth` (of Ampere 70% of the 5120 bytes a cycle that its white paper names; of Hopper the same
per cycle; of MI300X 128 bytes a cycle and channel at 60%), MI300X's latency to memory, and `launch`: what a kernel of a captured graph
adds on the device when the one before it has ended (1.3 microseconds on H100, as reported for Llama-1B decoding by Hazy Research).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Per processor (SM, CU) unless it says otherwise. Each has four schedulers with a quarter of its pipes."""

    name: str
    target: str  # as `aot` names it
    processors: int
    clock: float  # Hz
    memory_bandwidth: float  # bytes/s of the device, on paper
    read_bandwidth: float  # bytes/s of the device, reached by a streaming read
    l2_bandwidth: float  # bytes/s of the device
    l2_port: int  # bytes a cycle that one processor gets
    matrix: dict[str, int]  # operations a cycle: products and sums both count
    legacy_matrix: float  # share of that peak that instructions of the generation before reach
    lanes: int
    registers: int  # of 32 bits
    register_unit: int  # registers a thread are rounded up to this
    shared: int  # bytes
    shared_reserved: int  # bytes a program
    max_warps: int
    max_programs: int
    memory_latency: int  # cycles
    l2_latency: int
    shared_latency: int
    launch: float  # seconds

    @property
    def nvidia(self) -> bool:
        return self.target.startswith("cuda")

    def peak(self, unit: str) -> float:
        """Operations a second of the whole device."""
        return self.matrix[unit] * self.processors * self.clock


_AMPERE = {"lanes": 32, "registers": 65536, "register_unit": 8, "shared_reserved": 1024, "max_warps": 64, "max_programs": 32, "l2_port": 64}

A100 = Device(
    "A100 SXM 80 GB", "cuda:80", 108, 1.41e9, 2.039e12, 1.75e12, 5.0e12, matrix={"bf16": 2048, "int8": 4096}, legacy_matrix=1.0,
    shared=164 * 1024, memory_latency=560, l2_latency=261, shared_latency=29, launch=1.5e-6, **_AMPERE,
)  # fmt: skip
H100 = Device(
    "H100 SXM", "cuda:90", 132, 1.83e9, 3.35e12, 3.18e12, 6.5e12, matrix={"bf16": 4096, "int8": 8192, "fp8": 8192}, legacy_matrix=0.629,
    shared=228 * 1024, memory_latency=690, l2_latency=270, shared_latency=29, launch=1.3e-6, **_AMPERE,
)  # fmt: skip
H200 = Device(
    "H200 SXM", "cuda:90", 132, 1.83e9, 4.8e12, 4.48e12, 6.5e12, matrix={"bf16": 4096, "int8": 8192, "fp8": 8192}, legacy_matrix=0.629,
    shared=228 * 1024, memory_latency=690, l2_latency=270, shared_latency=29, launch=1.3e-6, **_AMPERE,
)  # fmt: skip
MI300X = Device(
    "MI300X", "hip:gfx942", 304, 2.1e9, 5.3e12, 4.26e12, 20e12, l2_port=64, matrix={"bf16": 2048, "int8": 4096, "fp8": 4096},
    legacy_matrix=1.0, lanes=64, registers=131072, register_unit=8, shared=64 * 1024, shared_reserved=0, max_warps=32, max_programs=32,
    memory_latency=800, l2_latency=254, shared_latency=64, launch=2.0e-6,
)  # fmt: skip

DEVICES = {device.name: device for device in (H100, H200, MI300X, A100)}
