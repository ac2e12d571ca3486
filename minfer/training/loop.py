"""The training loop: passes over the shards, a checkpoint every minute, the held-out sequences at the end of each pass.

What is random (weights at the start, the order of the shards) is a function of seed and pass, and the checkpoint is written whole or not at
all: an interrupted training goes on at the shard where it was, with the same result to rounding as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minfer.errors import ConfigError
from minfer.training.eagle3 import Eagle3
from minfer.training.head import Head, Target
from minfer.training.parallel import Medusa, ReDrafter
from minfer.training.publish import read_published
from minfer.training.samples import HELD_OUT, batches, shards_in

Kind = Literal["eagle3", "medusa", "redrafter"]
KINDS: dict[Kind, type[Head]] = {"eagle3": Eagle3, "medusa": Medusa, "redrafter": ReDrafter}
CHECKPOINT = "checkpoint.safetensors"
SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. `depth`: tokens guessed ahead; `max_len`: tokens of a sequence that are used."""

    kind: Kind
    depth: int = 3
    vocabulary: int = 4096
    epochs: int = 5
    batch: int = 2
    max_len: int = 384
    learning_rate: float = 1.5e-3
    seed: int = 0
    start_from: Path | None = None  # a published head, whose vocabulary stays


@dataclass
class Progress:
    """Where a training is. `steps` of about `total`; `loss` is a running mean."""

    epoch: int = 0
    shard: int = 0  # shards of this pass that are done
    steps: int = 0
    total: int = 0
    loss: float = 0.0
    acceptance: list[float] = field(default_factory=list)  # share of held-out positions whose first i + 1 guesses were right
    seconds_left: float = math.inf


def common_tokens(shards: Sequence[Path], count: int, vocab_size: int) -> tuple[torch.Tensor, float]:
    """The `count` commonest tokens of the answers, ascending, and the share of all tokens that they make up."""
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for shard in shards:
        with safe_open(shard, framework="pt") as f:
            seen += torch.bincount(f.get_tensor("tokens").long(), minlength=vocab_size)
    best = seen.topk(min(count, vocab_size)).indices.sort().values
    return best, float(seen[best].sum() / max(1, int(seen.sum())))


def train(
    target: Target, recipe: Recipe, folder: Path, on_step: Callable[[Progress], None] = lambda progress: None
) -> tuple[Head, Progress]:
    """Trains a head on the shards in `folder`, going on where an earlier call was interrupted. Raises ConfigError without shards."""
    shards = shards_in(folder)
    if not shards:
        raise ConfigError(f"{folder} holds nothing to train on")
    torch.manual_seed(recipe.seed)
    head = _new_head(target, recipe, shards)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    progress = Progress(total=recipe.epochs * _count_batches(shards, recipe))
    _restore(folder / CHECKPOINT, head, optimizer, progress, recipe)
    started, first, saved = time.monotonic(), progress.steps, time.monotonic()
    while progress.epoch < recipe.epochs:
        order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(recipe.seed + progress.epoch)).tolist()
        for number in order[progress.shard :]:
            for samples in batches(shards[number], recipe.batch, recipe.max_len, held_out=False):
                with torch.autocast("cpu", torch.bfloat16):  # of the products; weights, norms and losses stay float32
                    loss = head.loss(samples, _depth(head, progress))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                _set_rate(optimizer, recipe.learning_rate, progress)
                optimizer.step()
                progress.steps += 1
                progress.loss = loss.item() if progress.steps == 1 else 0.98 * progress.loss + 0.02 * loss.item()
                done = max(1, progress.steps - first)
                progress.seconds_left = (time.monotonic() - started) / done * max(0, progress.total - progress.steps)
                on_step(progress)
            progress.shard += 1
            if time.monotonic() - saved > SAVE_EVERY:
                _save(folder / CHECKPOINT, head, optimizer, progress, recipe)
                saved = time.monotonic()
        progress.epoch, progress.shard = progress.epoch + 1, 0
        progress.acceptance = held_out_acceptance(head, shards, recipe)
        _save(folder / CHECKPOINT, head, optimizer, progress, recipe)
        on_step(progress)
    return head, progress


def _new_head(target: Target, recipe: Recipe, shards: Sequence[Path]) -> Head:
    if recipe.start_from is None:
        vocabulary, _ = common_tokens(shards, recipe.vocabulary, target.config.vocab_size)
        return KINDS[recipe.kind](target, vocabulary, recipe.depth)
    tensors, vocabulary = read_published(recipe.start_from)
    wrong = f"{recipe.start_from} is no {recipe.kind} head of depth {recipe.depth} for this model"
    if not len(vocabulary) or int(vocabulary.min()) < 0 or int(vocabulary.max()) >= target.config.vocab_size:
        raise ConfigError(f"{wrong}: it guesses from tokens that are not of a vocabulary of {target.config.vocab_size}")
    head = KINDS[recipe.kind](target, vocabulary, recipe.depth)
    wanted, found = ({name: list(tensor.shape) for name, tensor in held.items()} for held in (head.state_dict(), tensors))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConfigError(f"{wrong}: its {name} is {found.get(name, 'missing')}, and should be {wanted.get(name, 'missing')}")
    head.load_state_dict(tensors)
    return head


@torch.no_grad()
def held_out_acceptance(head: Head, shards: Sequence[Path], recipe: Recipe) -> list[float]:
    """The share of held-out positions at which the first 1, 2, ... guesses were all right. The sequences are greedy, so are the guesses."""
    right, tried = torch.zeros(recipe.depth), torch.zeros(recipe.depth)
    for shard in shards:
        for samples in batches(shard, recipe.batch, recipe.max_len, held_out=True):
            with torch.autocast("cpu", torch.bfloat16):
                guesses = head.right(samples)  # [depth, B, S]
            whole = (guesses >= 0).to(torch.int8).cumprod(0).bool()
            right += ((guesses == 1).to(torch.int8).cumprod(0).bool() & whole).flatten(1).sum(1)
            tried += whole.flatten(1).sum(1)
    return [float(r / max(1.0, float(t))) for r, t in zip(right, tried, strict=True)]


def _count_batches(shards: Sequence[Path], recipe: Recipe) -> int:
    sizes = []
    for shard in shards:
        with safe_open(shard, framework="pt") as f:
            sizes.append(int((f.get_tensor("index") % HELD_OUT != 0).sum()))
    return sum(-(-size // recipe.batch) for size in sizes)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, progress: Progress) -> None:
    """Up in 20 steps, then down along a cosine to a twentieth."""
    warm = min(1.0, (progress.steps + 1) / 20)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress.steps / max(1, progress.total))))
    for group in optimizer.param_groups:
        group["lr"] = rate * warm * (0.05 + 0.95 * cosine)


def _depth(head: Head, progress: Progress) -> int:
    """How far ahead it learns to guess by now. Half the training goes into the next token alone, where further ones cost a pass each."""
    done = progress.steps / max(1, progress.total)
    if not head.staged or head.depth == 1:
        return head.depth
    return 1 if done < 0.5 else min(head.depth, 2 + int(2 * (done - 0.5) * (head.depth - 1)))


def _save(path: Path, head: Head, optimizer: torch.optim.AdamW, progress: Progress, recipe: Recipe) -> None:
    tensors = {f"head.{name}": tensor.detach().contiguous() for name, tensor in head.named_parameters()}
    for name, parameter in head.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
    facts: dict[str, Any] = {"epoch": progress.epoch, "shard": progress.shard, "steps": progress.steps, "loss": progress.loss}
    facts |= {"acceptance": progress.acceptance, "total": progress.total}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"progress": json.dumps(facts), "recipe": repr(recipe)})
    temporary.rename(path)


def _restore(path: Path, head: Head, optimizer: torch.optim.AdamW, progress: Progress, recipe: Recipe) -> None:
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    facts = json.loads(metadata["progress"])
    if metadata["recipe"] != repr(recipe) or facts["total"] != progress.total:
        raise ConfigError(f"{path} is of a training with other settings or data; remove it to begin anew, or repeat the settings")
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(tensors[f"head.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(facts["steps"])),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    progress.epoch, progress.shard, progress.steps = facts["epoch"], facts["shard"], facts["steps"]
    progress.loss, progress.acceptance = facts["loss"], facts["acceptance"]
