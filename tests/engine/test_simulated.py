"""The engine over a simulated GPU: what a step takes, and when the device has to wait for the host. The clock is not the real one."""

from __future__ import annotations

import dataclasses

import pytest
from kernels.test_simulated import Clock

from minfer.config import EngineConfig
from minfer.engine.simulated import simulated_engine
from minfer.errors import ConfigError
from minfer.kernels import simulated
from minfer.kernels.simulated import GIB, Gpu, find_gpu
from minfer.sampling_params import SamplingParams


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(simulated, "time", clock)
    return clock


def gpu_of(bandwidth: float) -> Gpu:
    """Time is bytes over bandwidth, and nothing else."""
    return Gpu("test", 80 * GIB, bandwidth, bf16=1e18, fp8=1e18, gap=0.0, launch=0.0, graph_launch=0.0, call=0.0)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(("element", "bits"), [("bf16", 16), ("fp8", 8), ("int4", 5)])
def test_a_decode_step_takes_its_bytes_over_the_bandwidth(element: str, bits: int, graphs: bool, clock: Clock) -> None:
    """llama2-7b: 6.5e9 weights in its layers, a head of 131e6 in 16 bits, 512 KiB of KV a token."""
    config = EngineConfig(model="llama2-7b", overlap="off", max_num_seqs=4, max_model_len=512, graphs=graphs)
    engine, device = simulated_engine(config, gpu_of(1e14), element)
    for n in range(4):
        engine.add_request(str(n), {"prompt_token_ids": [1] * 100}, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    engine.step()
    engine.step()
    device.reset()
    engine.step()
    busy, _, _ = device.reset()
    weights = (6_476_005_376 * bits + 131_072_000 * 16) / 8
    kv = 4 * 102 * 32 * 2 * 32 * 128 * 2
    assert busy * 1e14 == pytest.approx(weights + kv, rel=0.01)  # activations are the rest
    while engine.has_unfinished_requests:
        engine.step()
    assert engine.core.scheduler.pool.num_used == 0


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_with_overlap_the_device_does_not_see_what_the_host_does_between_steps(overlap: str, clock: Clock) -> None:
    """A device that takes some 30 ms a step, and a host that takes 15 after each."""
    config = EngineConfig(model="smollm2-135m", overlap=overlap, max_num_seqs=2, max_model_len=512)  # type: ignore[arg-type]
    engine, device = simulated_engine(config, gpu_of(9e9), "bf16")
    engine.add_request("a", {"prompt_token_ids": [1] * 9}, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True), kind="delta")
    idle = []
    for _ in range(9):
        engine.step()
        clock.now += 0.015
        idle.append(device.reset()[1])
    assert max(idle[2:]) < 1e-3 if overlap == "on" else min(idle[2:]) >= 0.015


@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_with_drafts_is_one_launch_with_graphs_and_many_without(graphs: bool, clock: Clock) -> None:
    """Two requests with three drafts each: up to eight rows through every kernel."""
    drafts = {"speculative": "ngram", "ngram_min_match": 1, "num_draft_tokens": 3, "adaptive_drafts": False, "graphs": graphs}
    config = EngineConfig(model="smollm2-135m", max_num_seqs=2, max_model_len=512, **drafts)  # type: ignore[arg-type]
    engine, device = simulated_engine(config, dataclasses.replace(gpu_of(1e14), launch=1e-3), "bf16")
    for name in "ab":
        engine.add_request(name, {"prompt_token_ids": [1, 2] * 9}, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
    speculation = engine.core.speculation
    assert speculation is not None
    engine.step()  # the prompts
    while speculation.stats.num_drafts < 6:
        device.reset()
        drafted = speculation.stats.num_draft_tokens
        engine.step()
        busy, _, launching = device.reset()
        assert busy * 1e14 > 2 * 134_500_000, "all weights are read"
        if graphs:
            assert launching < 0.01, "the head and the drawing of tokens stand behind the graph"
        elif speculation.stats.num_draft_tokens > drafted:
            assert launching > 0.2, "30 layers of more than seven kernels each"


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ConfigError, match="bf16, fp8, int4"):
        simulated_engine(EngineConfig(model="smollm2-135m"), find_gpu("h100"), "int3")
    with pytest.raises(ConfigError, match="drafts"):
        simulated_engine(EngineConfig(model="smollm2-135m", speculative="skip"), find_gpu("h100"), "bf16")
    with pytest.raises(ConfigError, match="doesn't fit"):
        simulated_engine(EngineConfig(model="llama2-7b"), Gpu("small", GIB, 1e12, 1e15, 1e15), "bf16")
