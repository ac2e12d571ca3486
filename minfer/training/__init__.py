"""Training drafting heads for a model, on the model's own answers: `minfer train-draft`.

prompts.py    what the model is asked: a file's prompts, or its own questions
samples.py    its answers and its inner states, through minfer's own engine, on disk
eagle3.py, parallel.py    the heads, in plain torch
loop.py       the training itself, resumable
publish.py    the result, in the layout its kind is published in
"""

from minfer.training.head import Target
from minfer.training.loop import KINDS, Kind, Progress, Recipe, common_tokens, train
from minfer.training.prompts import ask_itself, read_prompts
from minfer.training.publish import publish, read_published
from minfer.training.samples import TEMPERATURES, collect, shards_in

__all__ = [
    "KINDS",
    "TEMPERATURES",
    "Kind",
    "Progress",
    "Recipe",
    "Target",
    "ask_itself",
    "collect",
    "common_tokens",
    "publish",
    "read_prompts",
    "read_published",
    "shards_in",
    "train",
]
