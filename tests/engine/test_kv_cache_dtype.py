"""The engine over every kind of KV cache: it loads, generates, and says the same however a request was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minfer import LLM, SamplingParams
from minfer.config import EngineConfig
from minfer.errors import CapacityError, ConfigError
from minfer.kvcache import FORMATS, KVCache

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": [(7 * i * i + 3 * start) % 490 + 3 for i in range(length)]} for start, length in enumerate((90, 1, 33, 64, 17))
]


def engine(model: Path, kv: str, **options: Any) -> LLM:
    return LLM(
        str(model), **{"dtype": "float32", "threads": 1, "max_model_len": 160, "kv_cache_dtype": kv, "kv_cache_memory": 2**21, **options}
    )


def say(llm: LLM, params: SamplingParams = GREEDY) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kv", ["bf16", "fp8", "fp8_e5m2", "int8", "int4"])
def test_outputs_do_not_depend_on_how_they_were_computed(tiny_llama: Path, kv: str, backend: str) -> None:
    plain = engine(tiny_llama, kv, backend=backend, prefix_caching=False, graphs=False)
    assert plain.engine.config.kv_cache_dtype == kv
    expected = say(plain)
    assert expected == say(engine(tiny_llama, kv, backend=backend, max_num_batched_tokens=11, max_num_seqs=3, block_size=4))
    again = engine(tiny_llama, kv, backend=backend)
    assert say(again) == expected
    assert say(again) == expected, "from the prefix cache"
    loaded = again.engine.core.loaded
    tight = KVCache.token_bytes(loaded.model_config, loaded.cache.dtype) * 160
    preempting = engine(tiny_llama, kv, backend=backend, kv_cache_memory=tight, block_size=1)
    assert say(preempting) == expected
    assert preempting.engine.core.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("kv", ["fp8", "int8", "int4"])
def test_siblings_share_and_copy_blocks(tiny_llama: Path, kv: str) -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=12, ignore_eos=True)
    assert say(engine(tiny_llama, kv), params) == say(engine(tiny_llama, kv, prefix_caching=False, block_size=2), params)


def test_auto_is_the_models_type(tiny_llama: Path) -> None:
    assert engine(tiny_llama, "auto").engine.config.kv_cache_dtype == "fp32"
    assert engine(tiny_llama, "auto", dtype="bfloat16").engine.config.kv_cache_dtype == "bf16"


def test_a_wider_type_changes_nothing_and_a_narrower_one_little(tiny_llama: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def scores(kv: str) -> list[float]:
        (output,) = engine(tiny_llama, kv, max_num_batched_tokens=64).generate(PROMPTS[:1], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        ids = PROMPTS[0]["prompt_token_ids"]
        return [position[token].logprob for position, token in zip(output.prompt_logprobs, ids, strict=True) if position is not None]

    exact = scores("auto")
    assert scores("fp32") == exact
    for kv, bound in (("bf16", 0.1), ("fp16", 0.02), ("int8", 0.2), ("fp8", 0.6), ("fp8_e5m2", 1.0), ("int4", 1.5)):
        off = max(abs(a - b) for a, b in zip(scores(kv), exact, strict=True))
        assert 0 < off < bound, kv


def test_less_memory_a_token_is_more_tokens(tiny_llama: Path) -> None:
    tokens = {
        kv: engine(tiny_llama, kv, max_num_seqs=1024, max_num_batched_tokens=2048).engine.core.loaded.cache.num_blocks * 16
        for kv in FORMATS
    }
    for kv, kind in FORMATS.items():
        bytes_per_token = 2 * 2 * 2 * kind.row_bytes(16)  # K and V, layers, KV heads
        assert tokens[kv] == 2**21 // (16 * bytes_per_token) * 16, kv


def test_impossible_settings_are_refused_in_a_sentence(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, fp32, bf16, fp16, fp8, fp8_e5m2, int8, int4, not 'int2'"):
        EngineConfig(model="m", kv_cache_dtype="int2")  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match="store it as --kv-cache-dtype int8"):
        engine(tiny_llama, "auto", kv_cache_memory=512 * 100)
    from minfer.kernels.reference import ReferenceBackend

    monkeypatch.setattr(ReferenceBackend, "kv_formats", ("bf16",))
    with pytest.raises(ConfigError, match="the reference backend's rotary_kv doesn't know kv_cache_dtype int8; use bf16"):
        engine(tiny_llama, "int8", backend="reference")
