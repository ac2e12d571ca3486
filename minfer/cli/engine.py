"""The engine as the commands use it: loading it, saying how long that took, and running one request while its text streams."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from minfer.cli.terminal import Terminal
from minfer.config import CALIBRATED, EngineConfig
from minfer.errors import ConfigError
from minfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minfer.engine.input_processor import Prompt
    from minfer.engine.llm import LLM
    from minfer.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput


def load_llm(terminal: Terminal, config: EngineConfig) -> tuple[LLM, dict[str, float]]:
    """The model, ready to run, and the seconds of each phase of loading; the first is the import of torch and the engine."""
    started = time.perf_counter()
    # Calibrating shows bars, which a spinner would fight for the line.
    with contextlib.nullcontext() if config.quant in CALIBRATED else terminal.busy(f"loading {config.model}"):
        from minfer.engine.llm import LLM

        phases = {"import": time.perf_counter() - started}
        llm = LLM(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    phases |= llm.engine.core.loaded.phases.seconds
    phases["total"] = time.perf_counter() - started
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items() if name != "total")
    terminal.note(f"loaded {config.model} in {phases['total']:.2f} s ({parts})")
    return llm, phases


def only_adapter(config: EngineConfig) -> str | None:
    """The LoRA adapter that a command for one model runs with. Raises ConfigError where there are several."""
    if len(config.adapters) > 1:
        raise ConfigError("lora names several adapters, and this command runs one; give one, or serve them all with `minfer serve`")
    return config.adapters[0] if config.adapters else None


def run_request(
    llm: LLM,
    prompt: Prompt,
    params: SamplingParams,
    *,
    say: Callable[[str], None] = lambda text: None,
    stopped: Callable[[], bool] = lambda: False,
) -> RequestOutput:
    """Runs one request to its end and returns its whole output.

    `say` gets each new piece of the first answer's text; `stopped` is asked after each step whether to end the request where it
    stands (finish_reason "abort"). Where a LoRA adapter was loaded, it is run with that.
    """
    engine, request_id = llm.engine, "cli"
    engine.add_request(request_id, prompt, params, lora=only_adapter(engine.config), kind="delta")
    answers: dict[int, CompletionOutput] = {}
    try:
        while True:
            news = engine.abort([request_id]) if stopped() else engine.step()
            for output in news:
                for delta in output.outputs:
                    if delta.index == 0:
                        say(delta.text)
                    _extend(answers, delta)
                if output.finished:
                    return dataclasses.replace(output, outputs=[answers[index] for index in sorted(answers)])
    finally:  # Ctrl-C or a broken pipe: leave nothing running
        engine.abort([request_id])


def _extend(answers: dict[int, CompletionOutput], delta: CompletionOutput) -> None:
    so_far = answers.setdefault(delta.index, delta)
    if so_far is not delta:
        so_far.text += delta.text
        so_far.token_ids += delta.token_ids
        if so_far.logprobs is not None and delta.logprobs is not None:
            so_far.logprobs += delta.logprobs
        so_far.cumulative_logprob = delta.cumulative_logprob
        so_far.finish_reason, so_far.stop_reason = delta.finish_reason, delta.stop_reason


def timings(metrics: RequestMetrics) -> dict[str, float | None]:
    """Seconds, and the speed after the first token: that of decoding, apart from the prompt's."""
    span = None
    if metrics.first_token_time is not None and metrics.last_token_time is not None:
        span = metrics.last_token_time - metrics.first_token_time
    return {
        "queue_s": metrics.queue_s,
        "time_to_first_token_s": metrics.time_to_first_token_s,
        "time_per_output_token_s": metrics.time_per_output_token_s,
        "total_s": None if metrics.finished_time is None else metrics.finished_time - metrics.arrival_time,
        "tokens_per_s": (metrics.num_output_tokens - 1) / span if span else None,
    }


def summary(output: RequestOutput) -> str:
    """One line for people: `12 tokens, 23.1 tokens/s, first after 0.08 s, stop`."""
    spent = timings(output.metrics)
    tokens = sum(len(completion.token_ids) for completion in output.outputs)
    parts = [f"{tokens} token{'s' if tokens != 1 else ''}"]
    if spent["tokens_per_s"] is not None:
        parts.append(f"{spent['tokens_per_s']:.1f} tokens/s")
    if spent["time_to_first_token_s"] is not None:
        parts.append(f"first after {spent['time_to_first_token_s']:.2f} s")
    return ", ".join([*parts, *dict.fromkeys(completion.finish_reason or "" for completion in output.outputs)])
