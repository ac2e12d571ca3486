"""The model of a GPU's time: what it reads from machine code, what it does with it by hand-countable examples, and what it published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from minfer.kernels.triton.cost.code import Instruction, read
from minfer.kernels.triton.cost.compiled import cut
from minfer.kernels.triton.cost.devices import A100, DEVICES, H100, MI300X
from minfer.kernels.triton.cost.families import FAMILIES
from minfer.kernels.triton.cost.predict import Code, Work, floor, occupancy, predict
from minfer.kernels.triton.cost.report import PAGE, RESULTS, render
from minfer.kernels.triton.cost.warp import Share, simulate

PLENTY = Share(1e9, 1e9, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FFMA R5, R4, R3, R5", Instruction("", "fma", ("R5",), ("R4", "R3", "R5"))),
        ("@!P0 IADD3 R4, P1, R2, UR4, RZ", Instruction("", "alu", ("R4", "P1"), ("R2", "UR4"))),
        ("IMAD.WIDE.U32 R86, R85, 0x20, R2", Instruction("", "fma", ("R86", "R87"), ("R85", "R2"))),
        ("ISETP.GE.AND P1, PT, R21, R20, PT", Instruction("", "alu", ("P1",), ("R21", "R20"))),
        ("MUFU.EX2 R5, R4", Instruction("", "special", ("R5",), ("R4",))),
        ("LDG.E.128 R8, desc[UR6][R2.64]", Instruction("", "memory", ("R8", "R9", "R10", "R11"), ("UR6", "R2", "R3"), bytes=16)),
        ("@P0 LDG.E.U16 R8, desc[UR6][R2.64]", Instruction("", "memory", ("R8",), ("UR6", "R2", "R3"), bytes=2)),
        (
            "LDGSTS.E.BYPASS.128 [R5+0x4000], desc[UR6][R2.64], P3",
            Instruction("", "memory", (), ("R5", "UR6", "R2", "R3", "P3"), bytes=16, asynchronous=True),
        ),
        ("LDSM.16.M88.4 R24, [R76+UR12]", Instruction("", "shared", ("R24", "R25", "R26", "R27"), ("R76", "UR12"), bytes=16)),
        ("STS.64 [R4], R6", Instruction("", "shared", (), ("R4", "R6"), bytes=8, store=True)),
        (
            "HMMA.16816.F32.BF16 R20, R24, R18, RZ",
            Instruction(
                "", "matrix", ("R20", "R21", "R22", "R23"), ("R24", "R25", "R26", "R27", "R18", "R19"), operations=4096, legacy=True
            ),
        ),
        ("DEPBAR.LE SB0, 0x1", Instruction("", "other", waits={"copies": 1})),
        ("LDGDEPBAR", Instruction("", "other", commits=True)),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", Instruction("", "other", barrier=True)),
        ("UIADD3 UR4, UR4, 0x1, URZ", Instruction("", "other", ("UR4",), ("UR4",))),
    ],
)  # fmt: skip
def test_sass(text: str, expected: Instruction) -> None:
    assert_same(read(text, nvidia=True), expected)


def test_wgmma_is_fed_from_shared_memory() -> None:
    both = read("HGMMA.64x32x16.F32.BF16 R88, gdesc[UR16], R88", nvidia=True)
    one = read("HGMMA.64x128x16.F32.BF16 R24, R104, gdesc[UR16].tnspB, R24", nvidia=True)
    assert both.operations * 4 == 2 * 64 * 32 * 16
    assert both.bytes * 4 * 32 == 2 * 16 * (64 + 32)  # A and B, once for the four warps
    assert one.bytes * 4 * 32 == 2 * 16 * 128
    assert one.reads == ("R104", "R105", "R106", "R107")
    assert len(one.writes) == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v_mul_f32_e32 v5, s4, v3", Instruction("", "fma", ("v5",), ("s4", "v3"))),
        ("v_exp_f32_e32 v5, v3", Instruction("", "special", ("v5",), ("v3",))),
        ("global_load_dwordx4 v[4:7], v[2:3], off", Instruction("", "memory", ("v4", "v5", "v6", "v7"), ("v2", "v3"), bytes=16)),
        ("buffer_load_dword v30, v31, s[20:21], 0 offen", Instruction("", "memory", ("v30",), ("v31", "s20", "s21"), bytes=4)),
        ("ds_write_b64 v3, v[4:5]", Instruction("", "shared", (), ("v3", "v4", "v5"), bytes=8, store=True)),
        ("ds_read2_b64 v[2:5], v2 offset1:16", Instruction("", "shared", ("v2", "v3", "v4", "v5"), ("v2",), bytes=16)),
        ("s_waitcnt vmcnt(3) lgkmcnt(0)", Instruction("", "other", waits={"memory": 3, "shared": 0})),
        (
            "v_mfma_f32_16x16x16_bf16 a[8:11], v[54:55], v[2:3], 0",
            Instruction("", "matrix", ("a8", "a9", "a10", "a11"), ("v54", "v55", "v2", "v3"), operations=8192),
        ),
    ],
)  # fmt: skip
def test_amd(text: str, expected: Instruction) -> None:
    assert_same(read(text, nvidia=False), expected)


def assert_same(got: Instruction, expected: Instruction) -> None:
    names = [name for name in Instruction.__dataclass_fields__ if name != "text"]
    assert {name: getattr(got, name) for name in names} == {name: getattr(expected, name) for name in names}


def sass(*lines: str) -> list[Instruction]:
    return [read(line, nvidia=True) for line in lines]


def test_a_chain_takes_its_latency_and_independent_work_its_turn() -> None:
    chain = sass(*["FADD R1, R1, R2"] * 100)
    apart = sass(*[f"FADD R{n}, R{n}, R2" for n in range(3, 103)])
    assert simulate(chain, H100, PLENTY, 1).turn == 500  # five cycles each
    assert simulate(apart, H100, PLENTY, 1).turn == 100
    assert simulate(chain, H100, PLENTY, 4).turn == pytest.approx(500, abs=5)  # four warps fill each other's gaps
    assert simulate(apart, H100, PLENTY, 4).turn == 400


def test_pipes_have_their_rates() -> None:
    for line, cycles in (("IADD3 R{0}, R{0}, R2, RZ", 2), ("MUFU.EX2 R{0}, R{0}", 8), ("LDS.128 R{0}, [R{0}]", 16)):
        code = sass(*[line.format(4 * n) for n in range(1, 51)])
        assert simulate(code, H100, PLENTY, 4).turn == pytest.approx(4 * 50 * cycles, rel=0.01), line
    matrix = sass(*[f"HMMA.16816.F32.BF16 R{8 * n}, R200, R210, RZ" for n in range(1, 21)])
    assert simulate(matrix, A100, PLENTY, 1).turn == pytest.approx(20 * 8, abs=1)  # 4096 operations at 512 a cycle
    assert simulate(matrix, H100, PLENTY, 1).turn == pytest.approx(20 * 4 / 0.629, abs=1)


def test_loads_take_the_latency_or_the_bandwidth() -> None:
    loop = sass("LDG.E.128 R4, desc[UR6][R2.64]", "FADD R9, R4, R9")
    assert simulate(loop, H100, PLENTY, 1).turn == pytest.approx(H100.memory_latency, abs=10)
    narrow = Share(2.0, 1e9, 1.0)
    run = simulate(loop, H100, narrow, 8)
    assert run.turn == pytest.approx(8 * 512 / 2, rel=0.02)
    assert run.busy["dram"] == pytest.approx(1.0, abs=0.02)
    assert simulate(loop, H100, Share(2.0, 1e9, 0.0), 1).turn == pytest.approx(H100.l2_latency, abs=10)  # none of it from memory


def test_copies_in_flight_are_waited_for_by_groups() -> None:
    copy, close = "LDGSTS.E.128 [R5], desc[UR6][R2.64]", "LDGDEPBAR"
    eager = sass(copy, close, "DEPBAR.LE SB0, 0x0")
    ahead = sass(copy, close, "DEPBAR.LE SB0, 0x3")
    assert simulate(eager, H100, PLENTY, 1).turn == pytest.approx(H100.memory_latency, abs=15)
    assert simulate(ahead, H100, PLENTY, 1).turn == pytest.approx(H100.memory_latency / 4, rel=0.35)


def test_amd_waits_where_the_code_says() -> None:
    at_once = [read(line, False) for line in ("global_load_dwordx4 v[4:7], v[2:3], off", "s_waitcnt vmcnt(0)", "v_add_f32 v9, v4, v9")]
    later = [read(line, False) for line in ("global_load_dwordx4 v[4:7], v[2:3], off", "s_waitcnt vmcnt(3)", "v_add_f32 v9, v1, v9")]
    assert simulate(at_once, MI300X, PLENTY, 1).turn == pytest.approx(MI300X.memory_latency, abs=40)
    assert simulate(later, MI300X, PLENTY, 1, turns=32).turn == pytest.approx(MI300X.memory_latency / 4, rel=0.2)


def kernel(registers: int = 64, shared: int = 0, warps: int = 4, loop: list[Instruction] | None = None) -> Code:
    return Code(registers, 0, shared, warps, [], [loop] if loop else [], [])


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "device", "expected"),
    [
        (32, 0, 4, H100, 16),  # NVIDIA's occupancy calculator
        (96, 0, 4, H100, 5),
        (97, 0, 4, H100, 4),  # rounded up to 104
        (64, 48 * 1024, 4, H100, 4),
        (32, 100 * 1024, 8, A100, 1),
        (128, 0, 4, MI300X, 4),  # 512 registers a lane of a SIMD, four SIMDs
        (64, 20480, 4, MI300X, 3),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, device: Any, expected: int) -> None:
    assert occupancy(kernel(registers, shared, warps), device) == expected


def test_a_launch_ends_with_its_last_program() -> None:
    loop = sass(*["FADD R1, R1, R2"] * 200)
    one = predict(kernel(loop=loop), Work([(100,)] * 132, 0), H100)
    assert one.seconds - H100.launch == pytest.approx(100 * 1000 / H100.clock, rel=0.01)
    assert one.bound == "latency"
    ragged = predict(kernel(loop=loop), Work([(1,)] * 131 + [(300,)], 0), H100)
    assert ragged.seconds - H100.launch == pytest.approx(300 * 1000 / H100.clock, rel=0.01)
    few = predict(kernel(loop=loop), Work([(100,)] * 3, 0), H100)
    assert few.bound == "latency, few programs"
    with pytest.raises(ValueError, match="doesn't fit"):
        predict(kernel(shared=1 << 20), Work([()], 0), H100)


def test_a_plain_read_is_predicted_at_the_bandwidth() -> None:
    loop = sass(*[f"LDG.E.128 R{4 * n}, desc[UR6][R2.64]" for n in range(1, 9)], *[f"FADD R99, R{4 * n}, R99" for n in range(1, 9)])
    programs, turns = 132 * 16, 64
    moved = programs * turns * 8 * 16 * 128
    for device in DEVICES.values():
        if device.nvidia:
            found = predict(kernel(registers=32, loop=loop), Work([(turns,)] * programs, moved), device)
            assert 0.8 < found.share <= 1.0, device.name
            assert found.bound == "memory"


def test_loops_are_found_where_the_work_is() -> None:
    code = sass("IADD3 R1, R1, R2, RZ", "HMMA.16816.F32.BF16 R20, R24, R18, RZ", "FADD R1, R1, R2", "MUFU.EX2 R5, R4", "EXIT")
    before, loops, after = cut(code, [(0, 0), (1, 2)])
    assert (len(before), [len(loop) for loop in loops], len(after)) == (1, [2], 2)
    before, loops, after = cut(code, [(1, 2), (2, 3)])  # a path that jumps back into the loop from behind it
    assert [len(loop) for loop in loops] == [3]
    assert cut(code, []) == (code, [], [])


RESULT_FILES = sorted(RESULTS.glob("predicted-*.json"))


@pytest.mark.parametrize("path", RESULT_FILES, ids=lambda path: path.stem)
def test_published_figures_are_met_within_what_is_allowed(path: Path) -> None:
    result = json.loads(path.read_text())
    for check in result["checks"]:
        assert check["low"] <= check["predicted_us"] / check["published_us"] <= check["high"], check
    for row in result["cases"]:
        assert 0 < row["share"] < 1.001, row["case"]
        assert all(launch["spills"] == 0 for launch in row["launches"])


def test_the_page_is_made_from_the_results() -> None:
    def load(suffix: str) -> dict[str, Any]:
        paths = {name: RESULTS / f"predicted-{name}{suffix}.json" for name in FAMILIES}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}

    assert PAGE.read_text() == render(list(FAMILIES.values()), load(""), load("-before"))


@pytest.mark.parametrize(
    ("family", "case"), [("attention", "decode, 1 x 4096"), ("linear", "llama3.1-8b, bf16, 1 row"), ("moe", "3b, int4, 1 token")]
)
def test_the_committed_prediction_is_what_the_code_gives(family: str, case: str) -> None:
    """One case, compiled again: the committed file is of today's kernels and of today's model."""
    committed = json.loads((RESULTS / f"predicted-{family}.json").read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the predictions are of triton {committed['triton']}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "minfer.kernels.triton.cost", "--family", family, "--only", case]
    done = subprocess.run([*command, "--print-json"], env=environment, capture_output=True, text=True, check=True)
    rows = {(row["case"], row["device"]): row for row in committed["cases"]}
    fresh = json.loads(done.stdout)["cases"]
    assert len(fresh) >= 3
    for row in fresh:
        assert row == rows[row["case"], row["device"]], "if this is meant: python -m minfer.kernels.triton.cost"


def test_floors() -> None:
    assert floor(H100, 3_180_000_000_000, 0, "bf16") == pytest.approx(1.0)
    assert H100.peak("bf16") == pytest.approx(989.4e12, rel=0.01)  # as on the sheets
    assert A100.peak("bf16") == pytest.approx(312e12, rel=0.01)
    assert MI300X.peak("bf16") == pytest.approx(1307.4e12, rel=0.01)
