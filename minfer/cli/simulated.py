"""`minfer bench --simulate h200`: does this host keep up with that GPU? See `kernels/simulated.py` for what is real in it and what isn't.

Measured are decode steps: how long one takes, for how long of it the device had nothing to do, and what the host spent on which part.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from minfer.cli.measure import HOST_PARTS, Shape
from minfer.config import EngineConfig
from minfer.engine.core import CoreStep
from minfer.engine.outputs import OutputKind
from minfer.engine.watch import Watcher
from minfer.errors import ConfigError
from minfer.sampling_params import SamplingParams
from minfer.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from minfer.engine.engine import Engine
    from minfer.kernels.simulated import SimulatedDevice
    from minfer.tokenizer import Tokenizer

_ELEMENTS = {"auto": "bf16", "none": "bf16", "fp8": "fp8", "int4": "int4"}  # by the value of --quant
_WORDS_ALONE = "[A-Za-z ]+"
PARTS = (*HOST_PARTS, "forward", "output")


class _Parts(Watcher):
    """Seconds of each step's parts; `output` is all that surrounds the loop."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def stepped(self, step: CoreStep, started: float, ended: float) -> None:
        times = {part: getattr(step.times, part) for part in (*HOST_PARTS, "forward", "wait")}
        self.steps.append({**times, "output": ended - started - sum(times.values())})


def simulate(
    config: EngineConfig, gpu: str, shape: Shape, temperature: float = 0.0, kind: OutputKind = "delta", *, guided: bool = False
) -> dict[str, Any]:
    """One batch from its prompts to its last tokens, on a GPU by that name. `guided`: every request has a grammar, which allows words
    alone. Raises ConfigError for what can't be simulated.
    """
    from minfer.engine.simulated import simulated_engine
    from minfer.kernels.simulated import find_gpu

    if config.quant not in _ELEMENTS:
        raise ConfigError(f"--simulate knows --quant none, fp8 and int4, not {config.quant}")
    tokenizer = _tokenizer(config)
    engine, device = simulated_engine(config, find_gpu(gpu), _ELEMENTS[config.quant], tokenizer)
    form = StructuredOutputsParams(regex=_WORDS_ALONE) if guided else None
    params = SamplingParams(max_tokens=shape.output_tokens, ignore_eos=True, temperature=temperature, seed=0, structured_outputs=form)
    measured = measure_host(engine, device, shape, params, kind)
    asked = {"gpu": gpu, "model": config.model, "weights": _ELEMENTS[config.quant], "overlap": engine.core.overlaps}
    asked |= {"speculative": config.speculative, "guided": guided}
    return {**asked, **vars(shape), "temperature": temperature, "outputs": kind, "text": tokenizer is not None, **measured}


def measure_host(engine: Engine, device: SimulatedDevice, shape: Shape, params: SamplingParams, kind: OutputKind) -> dict[str, Any]:
    """Milliseconds of decode steps, as [median, 99th percentile]."""
    rng = random.Random(0)
    for n in range(shape.batch_size):
        prompt = [rng.randrange(engine.inputs.vocab_size) for _ in range(shape.prompt_tokens)]
        engine.add_request(f"bench-{n}", prompt, params, kind=kind)
    scheduler = engine.core.scheduler
    while scheduler.num_waiting or not all(request.output_token_ids for request in scheduler.running):
        engine.step()
    parts = _Parts()
    engine.watchers.add(parts)
    gc.collect()
    gc.freeze()  # what `minfer serve` does once it has loaded: no step is to pay for a look at the whole heap
    device.reset()
    seconds: list[float] = []
    on_device: list[tuple[float, float, float]] = []
    while len(scheduler.running) == shape.batch_size:
        begun = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begun)
        on_device.append(device.reset())
    return _summary(parts.steps, seconds, on_device)


def _summary(
    steps: Sequence[dict[str, float]], seconds: Sequence[float], on_device: Sequence[tuple[float, float, float]]
) -> dict[str, Any]:
    """Without the first steps, in which batch and buffers get their sizes, and the last, in which everybody ends."""
    kept = slice(3, -2)
    busy, idle, launching = (list(values)[kept] for values in zip(*on_device, strict=True))
    if not busy:
        raise ConfigError("there are too few decode steps to measure; ask for more --output-tokens")
    host = [sum(step[part] for part in PARTS) for step in steps[kept]]
    return {
        "steps": len(busy),
        "step_ms": _spread(seconds[kept]),
        "device_ms": _spread(busy),
        "idle_ms": _spread(idle),
        "host_ms": _spread(host),
        "launch_ms": _spread(launching),
        "host_parts_ms": {part: _spread([step[part] for step in steps[kept]]) for part in PARTS},
    }


def _spread(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [round(1e3 * median(ordered), 4), round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4)]


def _tokenizer(config: EngineConfig) -> Tokenizer | None:
    from minfer.engine.engine import open_tokenizer
    from minfer.loader import resolve_tokenizer

    if config.tokenizer is None:
        return None
    source = resolve_tokenizer(config.tokenizer, revision=config.revision)
    return None if source is None else open_tokenizer(source)


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for a terminal."""

    def pair(name: str) -> str:
        middle, high = result[name]
        return f"{middle:.3f} ms  (99th percentile {high:.3f})"

    parts = ", ".join(f"{part} {middle:.3f}" for part, (middle, _) in result["host_parts_ms"].items())
    shape = f"{result['batch_size']} x ({result['prompt_tokens']} + {result['output_tokens']} tokens)"
    return [
        ("simulated", f"{result['model']} with {result['weights']} weights on one {result['gpu']}"),
        ("overlap", "on" if result["overlap"] else "off"),
        ("shape", f"{shape}, {result['steps']} decode steps"),
        ("step", pair("step_ms")),
        ("device busy", pair("device_ms")),
        ("device idle", pair("idle_ms")),
        ("host", f"{pair('host_ms')}, of which launching is taken to cost {result['launch_ms'][0]:.3f} ms"),
        ("host, part by part", parts),
    ]
