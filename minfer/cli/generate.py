"""`minfer generate`: continue one prompt, streaming."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minfer.cli.command import command
from minfer.cli.engine import load_llm, only_adapter, run_request, summary, timings
from minfer.cli.options import engine_flags, sampling_flags
from minfer.cli.terminal import Terminal
from minfer.config import EngineConfig
from minfer.errors import ConfigError, RequestError
from minfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minfer.engine.outputs import CompletionOutput, PositionLogprobs, RequestOutput

# SamplingParams' own default, 16, is the API's for compatibility's sake; who reads an answer wants more of it.
MAX_TOKENS = 256


@command(engine=engine_flags(leave_out=["seed"]), sampling=sampling_flags(max_tokens=MAX_TOKENS))
def generate(
    terminal: Terminal,
    engine: EngineConfig,
    sampling: SamplingParams,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or none reads stdin, less one final line break.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message, through the model's chat template.")] = False,
) -> None:
    """Continue a prompt. The text streams to stdout; timings go to stderr."""
    if not terminal.json and (sampling.logprobs is not None or sampling.prompt_logprobs is not None):
        raise ConfigError("--logprobs and --prompt-logprobs are shown in the JSON object only; add --json")
    only_adapter(engine)
    text = read_prompt(terminal, prompt)
    llm, phases = load_llm(terminal, engine)
    ids = llm.get_tokenizer().apply_chat_template([{"role": "user", "content": text}]) if chat else None
    streaming = sampling.n == 1 and not terminal.json
    output = run_request(llm, text if ids is None else ids, sampling, say=terminal.write if streaming else lambda text: None)
    if not terminal.json:
        write_rest(terminal, output)
    terminal.note(summary(output))
    if terminal.json:
        terminal.result({"model": engine.model, "prompt": text, **as_json(output), "load_seconds": phases})


def read_prompt(terminal: Terminal, prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        terminal.note("reading the prompt from the terminal; end it with Ctrl-D")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on stdin is not UTF-8 text: {error}", param="prompt") from error


def write_rest(terminal: Terminal, output: RequestOutput) -> None:
    """What streaming has not written: the last line break, or all of several answers, which would mix on a screen."""
    if len(output.outputs) == 1:
        terminal.write("\n")
        return
    for completion in output.outputs:
        terminal.note(f"answer {completion.index + 1} of {len(output.outputs)}")
        terminal.write(completion.text + "\n")


def as_json(output: RequestOutput) -> dict[str, Any]:
    """The first answer's fields at the top, and all of them under `outputs`."""
    outputs = [_completion(completion) for completion in output.outputs]
    values: dict[str, Any] = {
        **{key: value for key, value in outputs[0].items() if key != "index"},
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        "timings": timings(output.metrics),
        "outputs": outputs,
    }
    if output.prompt_logprobs is not None:
        values["prompt_logprobs"] = [None if position is None else _logprobs(position) for position in output.prompt_logprobs]
    return values


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    values: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        values["logprobs"] = [_logprobs(position) for position in completion.logprobs]
        values["cumulative_logprob"] = completion.cumulative_logprob
    return values


def _logprobs(position: PositionLogprobs) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "logprob": value.logprob, "rank": value.rank, "token": value.decoded_token} for token, value in position.items()
    ]
