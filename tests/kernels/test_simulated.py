"""The simulated GPU, by the clock: one that goes forward when somebody looks at it, sleeps, or is told to."""

from __future__ import annotations

import pytest
import torch
from kernels.batches import make_batch

from minfer.errors import ConfigError
from minfer.kernels import simulated
from minfer.kernels.simulated import GIB, Gpu, SimulatedDevice, find_gpu

SLOW = Gpu("slow", 80 * GIB, bandwidth=1e9, bf16=1e12, fp8=2e12, gap=1e-3, launch=0.5e-3, graph_launch=0.25e-3, call=0.1e-3)
CLOSE = 1e-5


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-7
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(simulated, "time", clock)
    return clock


def test_launches_cost_the_host_little_and_reading_waits(clock: Clock) -> None:
    device = SimulatedDevice(SLOW)
    device.kernel(20e6)  # 20 ms and the gap
    device.kernel(1.0, operations=9e9)  # 9 ms of products and the gap
    wait = device.fetch(torch.tensor([4, 5]), torch.tensor([0.5]))
    assert clock.now == pytest.approx(100 + 2 * 0.5e-3 + 3 * 0.1e-3, abs=CLOSE)
    assert wait() == [[4, 5], [0.5]]
    assert clock.now == pytest.approx(100 + 0.5e-3 + 21e-3 + 10e-3, abs=CLOSE)
    busy, _, launching = device.reset()
    assert (busy, launching) == (pytest.approx(31e-3), pytest.approx(1.3e-3))
    assert device.busy == 0


def test_what_is_read_does_not_wait_for_what_was_launched_after_it(clock: Clock) -> None:
    device = SimulatedDevice(SLOW)
    device.kernel(1e6)
    wait = device.fetch(torch.tensor([1]))
    device.kernel(1e12)
    wait()
    assert clock.now < 101


def test_time_in_which_nothing_was_launched_is_idle(clock: Clock) -> None:
    device = SimulatedDevice(SLOW)
    device.kernel(1e6)
    device.fetch(torch.tensor([1]))()
    device.reset()
    clock.now += 0.02
    device.kernel(1e6)
    device.kernel(1e6)
    assert device.reset()[1] == pytest.approx(0.0205, abs=CLOSE)  # and the launch itself


def test_a_graph_takes_the_sum_of_its_kernels_at_the_lengths_of_its_replay(clock: Clock) -> None:
    device = SimulatedDevice(SLOW)
    batch = make_batch([(1, 10), (1, 30)], 16, 40)

    def run() -> list[torch.Tensor]:
        device.kernel(2e6)
        device.attention(0.0, 1e5, 0.0, batch)
        device.attention(0.0, 1e5, 0.0, batch)
        return [batch.positions]

    replay = device.record(run)
    assert device.reset() == (0, 0, 0)
    assert replay()[0] is batch.positions
    busy, _, launching = device.reset()
    assert (busy, launching) == (pytest.approx(5e-3 + 2 * 40 * 1e-4), 0.25e-3)
    batch.seq_lens.fill_(1)
    replay()
    assert device.reset()[0] == pytest.approx(5e-3 + 2 * 2 * 1e-4)


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="h100, h200"):
        find_gpu("h300")
