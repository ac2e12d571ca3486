"""What a drafting head is trained on: the model's own answers, and the inner states it had while it gave them.

A head has to guess what *this* model says, so the model writes the training text itself (self-distillation), through the same
engine that will draft later. The states come along for nothing: a `Collector` sits where a proposer would, is shown
the inner states of every token, and never proposes one.

    shard   tokens[N] | features[N, F * H] | final[N, H] in bfloat16, sequences back to back; ends[S], answers[S] (first answer token)

Shards are written as they fill, each whole or not at all, so that an interrupted collection goes on with the next prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minfer.engine.core import EngineCore
from minfer.models import FINAL
from minfer.runner import LoadedModel
from minfer.sampling_params import SamplingParams
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative.policy import Bar

HELD_OUT = 16  # every so manieth sequence is never trained on
TEMPERATURES = (0.0, 0.8)  # in turn: most people decode near one of them; what is held out is greedy


class Collector:
    """Keeps the inner states of all requests, [tokens, H] for each of `after`."""

    tells_chances = False

    def __init__(self, after: Sequence[int]) -> None:
        self.after: Sequence[int] = (*after, FINAL)
        self._rows: dict[Request, list[tuple[list[torch.Tensor], int, int]]] = {}  # of each step: its states, and which rows of them

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """States are kept by request, not by block."""

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        step = [state.to(torch.bfloat16, copy=True).cpu() for state in states]
        for item, own in zip(scheduled, rows, strict=True):
            kept = self._rows.setdefault(item.request, [])
            if item.start == 0:
                kept.clear()  # new, or preempted and begun again
            kept.append((step, own[0], own[-1] + 1))

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        return [[] for _ in requests]

    def take(self, request: Request) -> list[torch.Tensor]:
        """The states of a request that is over. Its last tokens have none: nothing followed them."""
        parts = self._rows.pop(request)
        return [torch.cat([step[layer][first:end] for step, first, end in parts]) for layer in range(len(self.after))]


@dataclass(frozen=True)
class Samples:
    """A few sequences, padded: tokens[B, S], features[B, S, F * H], final[B, S, H] float32; answer[B, S] marks what the model said."""

    tokens: torch.Tensor
    features: torch.Tensor
    final: torch.Tensor
    answer: torch.Tensor
    known: torch.Tensor  # [B, S] bool: there is a token and its state


def collect(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    after: Sequence[int],
    folder: Path,
    num_tokens: int,
    max_answer: int,
    temperatures: Sequence[float] = TEMPERATURES,
    group: int = 32,
) -> Iterator[int]:
    """Answers prompts, at these temperatures in turn, until there are `num_tokens` tokens of answers on disk; yields how many there are
    after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = shards_in(folder)
    done, total = _progress(shards[-1]) if shards else (0, 0)
    yield total
    collector = Collector(after)
    # Adaptive speculation doesn't show a proposer that never guesses right every step.
    core = EngineCore(replace(loaded, config=replace(loaded.config, adaptive_drafts=False)), proposer=collector)
    requests: dict[int, Request] = {}  # asked and not written down yet, by the number of the prompt, ascending
    asked = done
    while total < num_tokens and done < len(prompts):
        # Always `group` are answered at a time; a shard waits for the longest answer among its own, and the next ones' go on meanwhile.
        running = sum(not request.finished for request in requests.values())
        for index in range(asked, min(asked + group - running, len(prompts))):
            requests[index] = _request(loaded, prompts[index], index, max_answer, temperatures)
            core.scheduler.add(requests[index])
            asked = index + 1
        core.step()
        first = [requests[index] for index in range(done, min(done + group, asked))]
        if (len(first) == group or asked == len(prompts)) and all(request.finished for request in first):
            done += len(first)
            total += sum(len(request.output_token_ids) for request in first)
            _write(folder / f"shard-{done:07d}.safetensors", first, [collector.take(request) for request in first], done, total)
            for request in first:
                del requests[int(request.request_id)]
            yield total


def _request(loaded: LoadedModel, prompt: list[int], index: int, max_answer: int, temperatures: Sequence[float]) -> Request:
    temperature = 0.0 if index % HELD_OUT == 0 else temperatures[index % len(temperatures)]
    longest = min(len(prompt) + max_answer, loaded.max_model_len)
    params = SamplingParams(temperature=temperature, max_tokens=max_answer)
    return Request(
        request_id=str(index),
        prompt_token_ids=prompt,
        params=params,
        max_total_tokens=longest,
        seed=index,
        eos_token_ids=loaded.model_config.eos_token_ids,
        arrival=index,
    )


def _write(path: Path, requests: Sequence[Request], states: Sequence[list[torch.Tensor]], done: int, total: int) -> None:
    tokens = [torch.tensor(request.token_ids[: len(rows[0])]) for request, rows in zip(requests, states, strict=True)]
    tensors = {
        "tokens": torch.cat(tokens).int(),
        "features": torch.cat([torch.cat(rows[:-1], -1) for rows in states]),
        "final": torch.cat([rows[-1] for rows in states]),
        "ends": torch.tensor([len(part) for part in tokens]).cumsum(0),
        "answers": torch.tensor([request.num_prompt_tokens for request in requests]),
        "index": torch.tensor([int(request.request_id) for request in requests]),
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"progress": json.dumps([done, total])})
    temporary.rename(path)


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def _progress(shard: Path) -> tuple[int, int]:
    with safe_open(shard, framework="pt") as f:
        done, total = json.loads(f.metadata()["progress"])
    return done, total


def batches(shard: Path, size: int, max_len: int, *, held_out: bool) -> Iterator[Samples]:
    """The shard's sequences, `size` at a time, of like length together; only what is held out, or only the rest."""
    data = load_file(shard)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), data["ends"][:-1]))
    wanted = [i for i, index in enumerate(data["index"].tolist()) if (index % HELD_OUT == 0) == held_out]
    wanted.sort(key=lambda i: int(data["ends"][i] - starts[i]))
    for first in range(0, len(wanted), size):
        spans = [(int(starts[i]), min(int(data["ends"][i]), int(starts[i]) + max_len)) for i in wanted[first : first + size]]
        longest = max(end - start for start, end in spans)
        if longest < 3:
            continue
        part = {
            name: torch.stack([_padded(data[name][start:end], longest) for start, end in spans]) for name in ("tokens", "features", "final")
        }
        lengths = torch.tensor([end - start for start, end in spans])[:, None]
        at = torch.arange(longest)[None, :]
        answers = data["answers"][wanted[first : first + size]][:, None]
        known = at < lengths
        yield Samples(part["tokens"].long(), part["features"].float(), part["final"].float(), known & (at >= answers), known)


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat((rows, rows.new_zeros(length - len(rows), *rows.shape[1:])))
