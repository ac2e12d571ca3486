"""Through the whole engine: what comes out has the form, whoever runs beside it and however often it is preempted."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from minfer import LLM, SamplingParams, StructuredOutputsParams
from minfer.errors import RequestError

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "object", "properties": {"date": {"type": "string", "format": "date"}}, "required": ["date"], "additionalProperties": False},
    {"anyOf": [{"const": "none"}, {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}]},
    {"$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}}, "required": ["next"],
               "additionalProperties": False}}, "$ref": "#/$defs/n"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> LLM:
    return LLM(str(smollm2_gguf), max_model_len=512, max_num_seqs=16)


def chat(llm: LLM, text: str) -> dict[str, Any]:
    return {"prompt_token_ids": llm.get_tokenizer().apply_chat_template([{"role": "user", "content": text}])}


def test_schemas_on_a_real_model(smollm2: LLM) -> None:
    """Greedy and sampled, all in one batch; each output is complete and valid, or was cut by max_tokens."""
    prompts, params, schemas = [], [], []
    for schema in SCHEMAS:
        for temperature in (0.0, 1.5):
            prompts.append(chat(smollm2, "Answer in JSON that follows this schema: " + json.dumps(schema)))
            wish = StructuredOutputsParams(json=schema)
            params.append(SamplingParams(max_tokens=150, temperature=temperature, seed=3, structured_outputs=wish))
            schemas.append(schema)
    complete = 0
    for output, schema in zip(smollm2.generate(prompts, params, use_tqdm=False), schemas, strict=True):
        (completion,) = output.outputs
        if completion.finish_reason == "length":
            continue
        complete += 1
        jsonschema.validate(json.loads(completion.text), schema, format_checker=jsonschema.FormatChecker())
    assert complete >= 10, "the model rambled in more than two of twelve"


def test_n_sequences_follow_the_form_each_on_its_own(smollm2: LLM) -> None:
    params = SamplingParams(n=4, max_tokens=60, temperature=1.5, seed=1, structured_outputs={"json": SCHEMAS[1]})
    (output,) = smollm2.generate([chat(smollm2, "List some booleans.")], params, use_tqdm=False)
    texts = [completion.text for completion in output.outputs]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[1])
    assert len(set(texts)) > 1


def test_regex_choice_grammar_and_json_object(smollm2: LLM) -> None:
    wishes: list[dict[str, Any]] = [
        {"regex": r"[0-9]{3}-[0-9]{4}"},
        {"choice": ["Paris", "London", "Füssen"]},
        {"grammar": 'root ::= "<" word ("," word){2} ">"\nword ::= [a-z]{3,5}\n'},
        {"grammar": "start: /[a-z]{3}/ NUMBER\nNUMBER: /[0-9]{2}/\n"},
        {"json_object": True},
    ]
    prompts = [chat(smollm2, "What is the capital of France?")] * len(wishes)
    params = [SamplingParams(max_tokens=80, temperature=0.7, seed=5, structured_outputs=wish) for wish in wishes]
    texts = [output.outputs[0].text for output in smollm2.generate(prompts, params, use_tqdm=False)]
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", texts[0])
    assert texts[1] in ("Paris", "London", "Füssen")
    assert re.fullmatch(r"<[a-z]{3,5},[a-z]{3,5},[a-z]{3,5}>", texts[2])
    assert re.fullmatch(r"[a-z]{3}[0-9]{2}", texts[3])
    assert texts[4].startswith("{")


def test_whitespace_is_capped(smollm2: LLM) -> None:
    """A model that wants nothing but line breaks still gets to the end."""
    tokenizer = smollm2.get_tokenizer()
    spaces = {t: 100.0 for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t).strip() == b"" and tokenizer.token_bytes(t)}
    biased = dict(list(spaces.items())[:1000])
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    params = SamplingParams(max_tokens=200, temperature=0, logit_bias=biased, structured_outputs={"json": schema})
    (completion,) = smollm2.generate([chat(smollm2, "Hello")], params, use_tqdm=False)[0].outputs
    assert completion.finish_reason == "stop"
    assert len(json.loads(completion.text)) == 2
    assert max(len(gap) for gap in re.findall(r"\s+", completion.text)) <= 16


def test_ignoring_the_end_adds_no_text(smollm2: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, structured_outputs={"choice": ["yes"]})
    (completion,) = smollm2.generate([chat(smollm2, "Hello")], params, use_tqdm=False)[0].outputs
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("yes", "length", 12)


def test_neighbours_chunks_prefixes_and_preemption_change_nothing(tiny_llama: Path) -> None:
    """The same requests, alone in a roomy engine and crowded in a tiny one that chunks their prompts and preempts them."""
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "backend": "reference", "max_model_len": 192, "block_size": 8}
    prompts = [f"Write the record number {n} of the list. " * 3 for n in range(6)]
    params = [SamplingParams(max_tokens=90, temperature=1.0, seed=n, structured_outputs={"json": PERSON}) for n in range(6)]
    roomy = LLM(str(tiny_llama), kv_cache_memory=4 << 20, **settings)
    alone = [roomy.generate([p], q, use_tqdm=False)[0].outputs[0] for p, q in zip(prompts, params, strict=True)]
    blocks = 26  # a sequence needs up to 24 of them
    per_block = 8 * 2 * 2 * 2 * 16 * 4  # tokens x layers x (K, V) x heads x head_dim x bytes
    tight = LLM(str(tiny_llama), kv_cache_memory=blocks * per_block, max_num_batched_tokens=8, max_num_seqs=6, **settings)
    crowd = [output.outputs[0] for output in tight.generate(prompts, params, use_tqdm=False)]
    assert tight.engine.core.scheduler.stats.num_preemptions > 0
    assert [c.token_ids for c in crowd] == [c.token_ids for c in alone]
    for completion in crowd:
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), PERSON)
    assert tight.engine.grammar_masks.num_masks >= sum(len(c.token_ids) for c in crowd), "forced ones that fell too"


def test_speculation_changes_nothing(smollm2_gguf: Path, smollm2: LLM) -> None:
    """Drafts that leave the grammar are rejected by it, and neither end the request nor spoil the grammar."""
    schema = {"type": "array", "items": {"enum": ["alpha beta gamma", "delta epsilon"]}, "minItems": 6, "maxItems": 6}
    prompts = [chat(smollm2, "alpha beta gamma delta epsilon alpha beta zeta gamma alpha beta eta " * 3)] * 2
    params = [SamplingParams(max_tokens=120, temperature=t, seed=2, structured_outputs={"json": schema}) for t in (0.0, 1.0)]
    plain = smollm2.generate(prompts, params, use_tqdm=False)
    guessing = LLM(str(smollm2_gguf), max_model_len=512, max_num_seqs=16, speculative="ngram", adaptive_drafts=False, ngram_min_match=1)
    guessed = guessing.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].text for o in guessed] == [o.outputs[0].text for o in plain]
    assert [o.outputs[0].finish_reason for o in guessed] == ["stop", "stop"]
    stats = guessing.engine.core.speculation.stats  # type: ignore[union-attr]
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


LONG_NAMES: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"enum": ["a first value of many words", "another value"]} for name in ("identification", "classification")},
    "required": ["identification", "classification"],
    "additionalProperties": False,
}


def test_masks_are_filled_while_the_model_runs(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several rows all, in the thread beside the loop: none was left for the sampler to wait for from its beginning."""
    masks, threads = smollm2.engine.grammar_masks, []
    fill = masks._fill

    def watched(followers: list[Any]) -> Any:
        if len(followers) > 1:
            threads.append(threading.current_thread())
        return fill(followers)

    monkeypatch.setattr(masks, "_fill", watched)
    params = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(json=PERSON))
    smollm2.generate([chat(smollm2, "Who?"), chat(smollm2, "Who else?")], params, use_tqdm=False)
    assert len(threads) >= 10 and threading.main_thread() not in threads


def test_forced_tokens_take_no_steps_and_change_nothing(smollm2_gguf: Path, smollm2: LLM) -> None:
    """Greedy and sampled, alone and beside plain requests: token for token what one token a step gives, in fewer steps."""
    one_by_one = LLM(str(smollm2_gguf), max_model_len=512, max_num_seqs=16, forced_tokens="off")
    assert one_by_one.engine.core.forced is None
    prompts = [chat(smollm2, "Identify and classify it.")] * 4
    params = [SamplingParams(max_tokens=100, temperature=t, seed=4, structured_outputs={"json": LONG_NAMES}) for t in (0.0, 0.8, 1.5)]
    params.append(SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    stats = smollm2.engine.core.forced.stats  # type: ignore[union-attr]
    before = (smollm2.engine.core.scheduler.stats.num_steps, stats.num_accepted_tokens)
    fast = [o.outputs[0] for o in smollm2.generate(prompts, params, use_tqdm=False)]
    slow = [o.outputs[0] for o in one_by_one.generate(prompts, params, use_tqdm=False)]
    assert [c.token_ids for c in fast] == [c.token_ids for c in slow]
    jsonschema.validate(json.loads(fast[0].text), LONG_NAMES)
    steps = smollm2.engine.core.scheduler.stats.num_steps - before[0]
    assert steps < 0.75 * one_by_one.engine.core.scheduler.stats.num_steps
    assert stats.num_accepted_tokens - before[1] > 20
    assert stats.num_accepted_tokens > 0.8 * stats.num_tokens


def test_forced_tokens_beside_guesses(smollm2_gguf: Path, smollm2: LLM) -> None:
    """A proposer guesses where the form leaves a choice, and its estimate learns nothing from what had none."""
    guessing = LLM(str(smollm2_gguf), max_model_len=512, max_num_seqs=16, speculative="skip", adaptive_drafts=False, num_draft_tokens=2)
    params = SamplingParams(max_tokens=100, temperature=0, structured_outputs={"json": LONG_NAMES})
    prompts = [chat(smollm2, "Identify and classify it.")] * 2
    guessed = guessing.generate(prompts, params, use_tqdm=False)
    plain = smollm2.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in guessed] == [o.outputs[0].token_ids for o in plain]
    forced, stats = guessing.engine.core.forced, guessing.engine.core.speculation.stats  # type: ignore[union-attr]
    assert forced is not None and forced.stats.num_accepted_tokens > 10
    assert stats.num_draft_tokens > 0


def test_a_bad_schema_harms_nobody(smollm2: LLM) -> None:
    before = smollm2.engine.core.scheduler.stats.num_steps
    with pytest.raises(RequestError, match="JSON schema"):
        smollm2.generate(["a", "b"], [SamplingParams(), SamplingParams(structured_outputs={"json": {"type": "foo"}})], use_tqdm=False)
    assert smollm2.engine.core.scheduler.stats.num_steps == before
    assert smollm2.engine.core.scheduler.pool.num_used == 0
    assert smollm2.generate(["a"], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids
