"""The number of a seed and a position is the same bits wherever it is made: on the host, by the compiled sampler, by the Triton sampler.

Oracles from outside: Random123's known answers, of which only the first is a draw's (`tests/sampling/test_rng.py` holds the host against
all), and the Philox that Triton's authors wrote, which is what the Triton sampler calls.
"""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl
from kernels.devices import DEVICE
from sampling_rows import make_row

from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.runtime import DTYPES
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.sample import uniform_of
from minfer.sampling import Sampler
from minfer.sampling.rng import key_words, uniforms

EDGES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**53 + 1, 2**63 - 1]
KNOWN = (0x6627E8D5 << 21 ^ 0xE169C58D >> 11) * 2.0**-53  # philox4x32-10 of key 0 and counter 0: seed 0, position 0


def pairs(most: int) -> tuple[list[int], list[int]]:
    """Seeds of 64 bits and positions up to `most`; among them those where a word begins or ends."""
    numbers = random.Random(most)
    positions = [numbers.randrange(2 ** numbers.randint(1, most.bit_length() - 1)) for _ in range(300)]
    seeds = [numbers.randrange(2**64) for _ in range(300)]
    corners = [(seed, position) for seed in [*EDGES, 2**64 - 1] for position in EDGES if position <= most]
    return seeds + [seed for seed, _ in corners], positions + [position for _, position in corners]


def asked(seeds: list[int], positions: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.sample` takes them: who draws the token at a position has the one before it."""
    wishes = torch.tensor([(*key_words(seed), 1.0, 0.0, 1.0, 0.0) for seed in seeds], dtype=torch.float64)
    return wishes, torch.tensor([position - 1 for position in positions], dtype=dtype)


def of_cpu(cpu: CpuBackend, wishes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    op = cpu.runtime.op("uniforms", "ptr wishes, ptr positions, ptr out, int rows, int position_dtype")
    out = torch.empty(len(wishes), dtype=torch.float64)
    op(*map(cpu.runtime.ptr, (wishes, positions, out)), len(wishes), DTYPES[positions.dtype])
    return out


@triton.jit
def uniforms_kernel(wishes_ptr, positions_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), uniform_of(wishes_ptr, positions_ptr))


def of_triton(wishes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(wishes), dtype=torch.float64, device=DEVICE)
    uniforms_kernel[(len(wishes),)](wishes.to(DEVICE), positions.to(DEVICE), out)
    return out.cpu()


INDICES = pytest.mark.parametrize(("dtype", "most"), [(torch.int32, 2**31 - 1), (torch.int64, 2**63 - 1)], ids=str)


@INDICES
def test_the_compiled_sampler_makes_the_hosts_numbers(cpu: CpuBackend, dtype: torch.dtype, most: int) -> None:
    seeds, positions = pairs(most)
    assert of_cpu(cpu, *asked(seeds, positions, dtype)).tolist() == uniforms(seeds, positions).tolist()


@INDICES
def test_the_triton_sampler_makes_the_hosts_numbers(dtype: torch.dtype, most: int) -> None:
    seeds, positions = pairs(most)
    assert of_triton(*asked(seeds, positions, dtype)).tolist() == uniforms(seeds, positions).tolist()


def test_the_known_answer(cpu: CpuBackend) -> None:
    first = asked([0], [0], torch.int64)
    assert of_cpu(cpu, *first).tolist() == of_triton(*first).tolist() == uniforms([0], [0]).tolist() == [KNOWN]


GIVEN = pytest.mark.parametrize("given", [False, True], ids=["positions of the rows", "positions given"])


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@GIVEN
def test_a_row_is_drawn_with_the_number_of_its_seed_and_position(triton: bool, given: bool) -> None:
    backend, device = TritonBackend(DEVICE, torch.float16), DEVICE if triton else torch.device("cpu")
    check(Sampler(4000, device, draw=backend.sample if triton else None), given)


@GIVEN
def test_a_row_is_drawn_with_its_number_by_compiled_kernels(cpu: CpuBackend, given: bool) -> None:
    check(Sampler(4000, draw=cpu.sample), given)


def check(sampler: Sampler, given: bool) -> None:
    """Of evenly likely tokens it is the one in whose share the number lies, also when the same rows come back at other positions."""
    numbers, width, device = random.Random(3), sampler.vocab_size, sampler.device
    seeds = [numbers.randrange(2**64) for _ in range(12)]
    rows = [make_row(seed, [0] * numbers.randrange(1, 3000)) for seed in seeds]
    for _ in range(3):
        positions = torch.tensor([row.position - 1 for row in rows], dtype=torch.int32, device=device) if given else None
        drawn = sampler.draw(torch.zeros(len(rows), width, device=device), rows, positions).wait()
        expected = uniforms(seeds, [row.position for row in rows])
        assert drawn.token_ids == [int(number * width) for number in expected]
        for row in rows:
            row.output_token_ids += [0] * numbers.randrange(1, 4)
