"""The reference's answers are asked once, kept one by one, and survive an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compare.quality import Reference


class Engine:
    """Stands in for fp32 transformers: counts what it is asked, and can be made to stop."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.asked: list[list[int]] = []
        self.stop_after = stop_after

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, requests: list[Any], *_: object) -> list[Any]:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(requests[0].token_ids)
        return [type("Trace", (), {"token_ids": [sum(requests[0].token_ids)] * requests[0].max_tokens})]

    def ask(self, op: str, limit: float, **message: Any) -> dict[str, Any]:
        return {"logprobs": [{str(context[0]): -0.5} for context in message["contexts"]]}


def reference(file: Path, engine: Engine) -> Reference:
    return Reference(file, lambda: engine, 100, 30)  # type: ignore[arg-type, return-value]


def test_only_new_prompts_are_asked(tmp_path: Path) -> None:
    first = Engine()
    assert reference(tmp_path / "r.json", first).tokens([[1, 2], [3]], 2) == [[3, 3], [3, 3]]
    later = Engine()
    answers = reference(tmp_path / "r.json", later)
    assert answers.tokens([[3], [4]], 2) == [[3, 3], [4, 4]]
    assert answers.next_logprobs([[1, 2]], 2) == [{1: -0.5}]
    assert later.asked == [[4]]


def test_an_interrupted_start_is_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        reference(tmp_path / "r.json", Engine(stop_after=2)).tokens([[1], [2], [3]], 1)
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2
    rest = Engine()
    assert reference(tmp_path / "r.json", rest).tokens([[1], [2], [3]], 1) == [[1], [2], [3]]
    assert rest.asked == [[3]]
