"""Who asks for what. Everything is drawn from one seed, so a run that found something can be had again."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from compare.load.exchange import Ask

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = (
    "the",
    "a",
    "river",
    "stone",
    "light",
    "of",
    "and",
    "winter",
    "count",
    "from",
    "one",
    "to",
    "ten",
    "was",
    "told",
    "by",
    "who",
    "ran",
)

MALFORMED: tuple[tuple[str, bytes], ...] = (
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b"\xff\xfe\x00"),
    (COMPLETIONS, b'{"prompt": 5}'),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": -1}'),
    (COMPLETIONS, b'{"prompt": "a", "n": 1000000000}'),
    (COMPLETIONS, b'{"prompt": "a", "temperature": "hot"}'),
    (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"x": 1}}'),
    (COMPLETIONS, b'{"prompt": "a", "structured_outputs": {"regex": "("}, "stream": true}'),
    (COMPLETIONS, b'{"prompt": "a", "model": "another"}'),
    (CHAT, b'{"messages": []}'),
    (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "stream": true}'),
    ("/v1/nowhere", b"{}"),
)


@dataclass(frozen=True)
class Crowd:
    """Shares are of all requests; lengths are ranges."""

    prompt_words: tuple[int, int] = (4, 60)
    output_tokens: tuple[int, int] = (4, 48)
    chats: float = 0.5  # the others ask for completions
    whole: float = 0.1  # don't stream
    several: float = 0.05  # n = 2
    leaving: float = 0.2
    malformed: float = 0.05
    slow: float = 0.05
    pause_seconds: float = 1.0

    def asks(self, count: int, seed: int) -> list[Ask]:
        rng = random.Random(seed)
        return [self._one(rng) for _ in range(count)]

    def _one(self, rng: random.Random) -> Ask:
        kind = rng.random()
        if kind < self.malformed:
            return Ask(*rng.choice(MALFORMED))
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(*self.prompt_words)))
        tokens = rng.randint(*self.output_tokens)
        body: dict[str, object] = {"max_tokens": tokens, "ignore_eos": True, "stream": rng.random() >= self.whole}
        if rng.random() < self.several:
            body["n"] = 2
        chat = rng.random() < self.chats
        body |= {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}
        ask = Ask(CHAT if chat else COMPLETIONS, json.dumps(body).encode())
        if kind < self.malformed + self.leaving:
            ask.leave_after = self._when_to_leave(rng, tokens)
        elif kind < self.malformed + self.leaving + self.slow:
            ask.pause_seconds = self.pause_seconds
        return ask

    def _when_to_leave(self, rng: random.Random, tokens: int) -> tuple[float, int, float]:
        """In the middle of sending, at once, in the queue or the prompt, or while the answer comes."""
        phase = rng.randrange(4)
        if phase == 0:
            return rng.random(), 0, rng.random() * 0.05
        if phase == 1:
            return 1.0, 0, 0.0
        return (1.0, 0, rng.random() * 0.5) if phase == 2 else (1.0, rng.randint(1, max(1, tokens // 2)), 0.0)


STREAMS = Crowd(whole=0.0, several=0.0, leaving=0.0, malformed=0.0, slow=0.0)  # the well-behaved, for measuring
