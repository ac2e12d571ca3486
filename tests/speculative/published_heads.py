"""The published drafting heads, transcribed in float64 without caches or batches, from files in the layouts they are published in.

Everything is recomputed for every draft over the whole sequence, as their papers and reference code define it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Published:
    """`hidden[n]`: the target's states after n layers, [T, H]; `final`: what its head sees; `embedding`, `output`: its matrices."""

    def __init__(self, folder: Path, embedding: torch.Tensor, output: torch.Tensor) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.w = {name: t.double() if t.is_floating_point() else t for name, t in load_file(folder / "model.safetensors").items()}
        self.embedding, self.output = self.w.get("embed_tokens.weight", embedding.double()), output.double()

    def draft(self, tokens: list[int], hidden: list[torch.Tensor], final: torch.Tensor, count: int, favoured: torch.Tensor) -> list[int]:
        """`count` greedy guesses after `tokens`, of which all but the last have states; the ids `favoured` having a bias."""
        hidden, final = [h.double() for h in hidden], final.double()
        if "medusa_num_heads" in self.config or self.config.get("model_type") == "medusa":
            return [self._best(self._medusa(final[-1], head), favoured) for head in range(min(count, 3))]
        if self.config.get("model_type") == "recurrent_drafting_drafter":
            return self._redrafter(tokens, final[-1], count, favoured)
        return self._eagle(tokens, hidden, final, count, favoured)

    def _best(self, logits: torch.Tensor, favoured: torch.Tensor) -> int:
        """logits over all ids [V], of which those in `favoured` get 90 more."""
        biased = logits.clone()
        biased[favoured] += 90
        return int(biased.argmax())

    def _spread(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of a reduced vocabulary over all ids."""
        if "d2t" in self.w:
            ids = torch.tensor([i + int(d) for i, d in enumerate(self.w["d2t"])])
        elif "token_map" in self.w:
            ids = self.w["token_map"]
        else:
            return logits
        out = torch.full((512,), -torch.inf, dtype=torch.float64)
        out[ids] = logits
        return out

    def _medusa(self, h: torch.Tensor, head: int) -> torch.Tensor:
        w, x = self.w, h
        if "medusa_num_heads" in self.config:
            for block in range(2):
                x = x + F.silu(w[f"{head}.{block}.linear.weight"] @ x + w[f"{head}.{block}.linear.bias"])
            return w[f"{head}.2.weight"] @ x
        x = x + F.silu(w[f"blocks.{head}.layers.0.weight"] @ x)
        return self._spread(w[f"lm_heads.{head}.weight"] @ x)

    def _redrafter(self, tokens: list[int], h: torch.Tensor, count: int, favoured: torch.Tensor) -> list[int]:
        w, state, drafts = self.w, torch.zeros_like(h), [tokens[-1]]
        for _ in range(count):
            state = F.silu(w["rnn_w.weight"] @ self.embedding[drafts[-1]] + w["rnn_u.weight"] @ state + w["rnn_u.bias"])
            x = w["input_proj.weight"] @ torch.cat((h, state)) + w["input_proj.bias"]
            for block in range(2):
                x = x + F.silu(w[f"lm_head.{block}.linear.weight"] @ x + w[f"lm_head.{block}.linear.bias"])
            drafts.append(self._best(w["lm_head.2.weight"] @ x, favoured))
        return drafts[1:]

    def _eagle(self, tokens: list[int], hidden: list[torch.Tensor], final: torch.Tensor, count: int, favoured: torch.Tensor) -> list[int]:
        speculators = "transformer_layer_config" in self.config
        third = speculators or "draft_vocab_size" in self.config
        if third:
            ids = (
                self.config["eagle_aux_hidden_state_layer_ids"]
                if speculators
                else self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
            )
            states = torch.cat([hidden[n] for n in ids], -1) @ self.w["fc.weight"].T
        else:
            states = final
        inputs, drafts = list(tokens[1:]), []
        for _ in range(count):
            embedded = self.embedding[torch.tensor(inputs)]
            if third:
                out = self._third_layer(embedded, states, before=speculators)
                logits = self._spread(self.w["lm_head.weight"] @ norm(out[-1], self.w["norm.weight"]))
            else:
                out = self._first_layer(torch.cat((embedded, states), -1) @ self.w["fc.weight"].T + self.w["fc.bias"])
                logits = self.output @ out[-1]
            drafts.append(self._best(logits, favoured))
            inputs.append(drafts[-1])
            states = torch.cat((states, out[-1:]))
        return drafts

    def logits_after(self, tokens: list[int], hidden: list[torch.Tensor], drafts: list[int]) -> torch.Tensor:
        """EAGLE-3's logits [512] behind `tokens` and these drafts, of which no states are known."""
        states = torch.cat([h.double() for h in hidden], -1) @ self.w["fc.weight"].T
        inputs = list(tokens[1:])
        for draft in [*drafts, None]:
            out = self._third_layer(self.embedding[torch.tensor(inputs)], states, before=False)
            if draft is not None:
                inputs.append(draft)
                states = torch.cat((states, out[-1:]))
        return self._spread(self.w["lm_head.weight"] @ norm(out[-1], self.w["norm.weight"]))

    def _first_layer(self, x: torch.Tensor) -> torch.Tensor:
        return self._after_attention(x + self._attention(x, "layers.0."), "layers.0.")

    def _third_layer(self, embedded: torch.Tensor, states: torch.Tensor, before: bool) -> torch.Tensor:
        prefix = "layers.0." if before else "midlayer."
        normed = norm(states, self.w[prefix + "hidden_norm.weight"])
        x = torch.cat((norm(embedded, self.w[prefix + "input_layernorm.weight"]), normed), -1)
        return self._after_attention((normed if before else states) + self._attention(x, prefix), prefix)

    def _after_attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        w = self.w
        y = norm(x, w[prefix + "post_attention_layernorm.weight"])
        y = F.silu(y @ w[prefix + "mlp.gate_proj.weight"].T) * (y @ w[prefix + "mlp.up_proj.weight"].T)
        return x + y @ w[prefix + "mlp.down_proj.weight"].T

    def _attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        w, size = self.w, len(x)
        q, k, v = ((x @ w[f"{prefix}self_attn.{name}_proj.weight"].T).view(size, -1, 16).transpose(0, 1) for name in "qkv")
        angles = torch.outer(torch.arange(size).double(), 5000.0 ** -(torch.arange(0, 16, 2).double() / 16))
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        q, k = (y * cos + torch.cat((-y[..., 8:], y[..., :8]), -1) * sin for y in (q, k))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(size, -1)
        return out @ w[f"{prefix}self_attn.o_proj.weight"].T


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
