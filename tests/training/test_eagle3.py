"""The training twin of the EAGLE-3 head against the transcription of the published one: unrolled over its own outputs, column by column."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from speculative.published_heads import Published

from minfer.loader import open_checkpoint, resolve_model
from minfer.training.eagle3 import Eagle3
from minfer.training.head import Target
from minfer.training.publish import publish
from minfer.training.samples import Samples


def test_the_unrolled_steps_are_the_drafts_of_the_published_module(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(
        "llama", num_hidden_layers=6, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-5
    )
    target = Target.of(open_checkpoint(resolve_model(str(folder))))
    vocabulary = torch.arange(2, 500, 2)
    head = Eagle3(target, vocabulary, depth=3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1).copy_(parameter.to(torch.bfloat16))  # as it is published
    publish(head, "eagle3", (0, 1, 2), tmp_path, [0.5], "tiny")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["draft_vocab_size"] == len(vocabulary) and config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    published = Published(tmp_path, target.embeddings, target.head)

    torch.manual_seed(1)
    size = 12
    tokens, states, final = torch.randint(3, 500, (1, size)), torch.randn(3, size, 64), torch.randn(1, size, 64)
    features = torch.cat(list(states), -1)[None]
    everything = torch.ones(1, size, dtype=torch.bool)
    with torch.no_grad():
        steps = head.unroll(Samples(tokens, features, final, everything, everything), 3)
        logits = [readout(state) for state, readout in steps]
    for column in range(1, size - 4):
        # With the true tokens as the drafts before, which is how it is trained.
        for step in range(3):
            known = tokens[0, : column + 2].tolist()
            inner = [state[: column + 1] for state in states]
            expected = published.logits_after(known, inner, tokens[0, column + 2 : column + 2 + step].tolist())
            assert (logits[step][0, column].double() - expected[vocabulary]).abs().max() < 1e-3


def test_labels_stand_where_the_guesses_do(make_checkpoint: Callable[..., Path]) -> None:
    """A guess at column t about token t + 2 + step counts only where that token is part of the answer, and known."""
    folder = make_checkpoint("llama", num_hidden_layers=6)
    head = Eagle3(Target.of(open_checkpoint(resolve_model(str(folder)))), torch.arange(512), depth=2)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 0, 0]])
    known = torch.arange(8)[None] < 6
    answer = known & (torch.arange(8)[None] >= 4)
    samples = Samples(tokens, torch.zeros(1, 8, 192), torch.zeros(1, 8, 64), answer, known)
    for step, wanted in enumerate(([-1, -1, 0, 1, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1])):
        logits = torch.zeros(1, 8, 512)
        logits[..., 10] = 1  # the last token of the answer
        assert head.rightness(logits, samples, step + 1)[0].tolist() == wanted


def test_the_loss_is_that_of_every_column_that_says_an_answers_token(make_checkpoint: Callable[..., Path]) -> None:
    """Against the cross-entropies of all columns, made one by one in float64."""
    folder = make_checkpoint("llama", num_hidden_layers=6)
    target = Target.of(open_checkpoint(resolve_model(str(folder))))
    torch.manual_seed(2)
    head = Eagle3(target, torch.arange(1, 400), depth=2)
    tokens = torch.randint(3, 500, (2, 9))
    known = torch.arange(9)[None] < torch.tensor([[9], [6]])
    answer = known & (torch.arange(9)[None] >= torch.tensor([[4], [3]]))
    samples = Samples(tokens, torch.randn(2, 9, 192), torch.randn(2, 9, 64), answer, known)
    wanted = (samples.final.double() @ target.head[1:400].double().T).softmax(-1)
    total = 0.0
    for ahead, (state, readout) in enumerate(head.unroll(samples, 2), 1):
        scores = readout(state).detach().double().log_softmax(-1)
        at = [(row, column) for row, end, begin in ((0, 9, 4), (1, 6, 3)) for column in range(begin, end)]
        losses = [-(wanted[row, column] * scores[row, column - ahead]).sum() for row, column in at]
        total += 0.8 ** (ahead - 1) * float(sum(losses) / len(losses))
    assert head.loss(samples, 2).item() == pytest.approx(total, rel=1e-5)
    nothing = Samples(tokens, samples.features, samples.final, torch.zeros_like(answer), known)
    assert head.loss(nothing, 2).item() == 0
