"""Every bad value is refused at construction, with the field's name; every good one is kept or put into one form."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
from typing import Any

import pytest

from minfer.errors import RequestError
from minfer.sampling_params import SamplingParams

NUMBERS = {
    "temperature": (0.0, 100.0, [-0.1, 100.1]),
    "top_p": (1e-9, 1.0, [0.0, -0.5, 1.0001]),
    "min_p": (0.0, 1.0, [-1e-9, 1.1]),
    "typical_p": (1e-9, 1.0, [0.0, 1.1]),
    "repetition_penalty": (0.01, 100.0, [0.0, 1e-3, -1.0, 101.0]),
    "presence_penalty": (-2.0, 2.0, [-2.1, 2.1]),
    "frequency_penalty": (-2.0, 2.0, [-2.1, 2.1]),
}
INTEGERS = {
    "n": (1, 128, [0, -1, 129]),
    "max_tokens": (1, 10**6, [0, -1]),
    "min_tokens": (0, 16, [-1]),
    "top_k": (0, 10**6, [-2]),
    "seed": (-(2**63), 2**63 - 1, [2**63, -(2**63) - 1]),
    "logprobs": (0, 20, [-1, 21]),
    "prompt_logprobs": (0, 20, [-1, 21]),
}


def refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    low, high, outside = NUMBERS[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (*outside, math.nan, math.inf, -math.inf, True, False, "0.5", None, [0.5], 10**400, -(10**5000)):
        refused(name, value)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    low, high, outside = INTEGERS[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (*outside, True, False, 1.0, math.nan, "1", [1], -(10**5000)):
        refused(name, value)


@pytest.mark.parametrize("name", ["max_tokens", "seed", "logprobs", "prompt_logprobs", "logit_bias"])
def test_none_means_not_set(name: str) -> None:
    assert getattr(SamplingParams(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "ignore_eos", "skip_special_tokens"])
def test_flags(name: str) -> None:
    assert getattr(SamplingParams(**{name: True}), name) is True
    for value in (0, 1, "true", None):
        refused(name, value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("stop", ["a", "\n\n"], [5, {"a": 1}, [""], [5], ["a"] * 17, b"a"]),
        ("bad_words", ["a", " b"], ["word", 5, [""], [None], ["a"] * 257]),
        ("stop_token_ids", [0, 5], [5, "5", ["5"], [True], [-1], [1.0]]),
        (
            "logit_bias",
            {0: 1, 5: -100.0},
            [[1], {"5": 1.0}, {5: 101}, {5: math.nan}, {-1: 0.0}, {True: 0.0}, dict.fromkeys(range(1025), 0.0)],
        ),
    ],
)
def test_lists(name: str, good: Any, bad: list[Any]) -> None:
    kept = getattr(SamplingParams(**{name: good}), name)
    assert kept == (good if isinstance(good, dict) else tuple(good))
    for value in bad:
        refused(name, value)


def test_one_form_for_each_meaning() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=None, bad_words=None, stop_token_ids=None) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams(top_k=-1).top_k == 0
    refused("top_k", -1.0)


def test_min_tokens_within_max_tokens() -> None:
    SamplingParams(min_tokens=16, max_tokens=16)
    SamplingParams(min_tokens=100, max_tokens=None)
    with pytest.raises(RequestError, match="min_tokens must not exceed max_tokens=16"):
        SamplingParams(min_tokens=17)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    assert SamplingParams.from_mapping({"temperature": 0.5, "stop": "x"}) == SamplingParams(temperature=0.5, stop="x")
    with pytest.raises(RequestError, match=r"'temprature'.*known are .*temperature") as caught:
        SamplingParams.from_mapping({"temprature": 0.5})
    assert caught.value.param == "temprature"
    with pytest.raises(RequestError, match="bad_word_token_ids"):
        SamplingParams.from_mapping({"bad_word_token_ids": ((1,),)})


def test_frozen_and_apart_from_the_callers_objects() -> None:
    bias = {5: 1.0}
    stop = ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[6] = 2.0
    stop.append("b")
    assert params.logit_bias == {5: 1.0}
    assert params.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.0  # type: ignore[misc]


def test_copies_and_replacements_stay_the_same() -> None:
    params = SamplingParams(top_k=-1, stop="x", logit_bias={1: 2.0}, bad_words=["y"], seed=3)
    assert dataclasses.replace(params) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, bad_word_token_ids=((1, 2),)).stop == ("x",)


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy


def test_defaults_are_those_of_vllm() -> None:
    """Written down from vLLM's SamplingParams, so that scripts carry over."""
    theirs = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0}
    theirs |= {"top_k": 0, "min_p": 0.0, "seed": None, "ignore_eos": False, "max_tokens": 16, "min_tokens": 0, "logprobs": None}
    theirs |= {"prompt_logprobs": None, "skip_special_tokens": True, "include_stop_str_in_output": False, "logit_bias": None}
    ours = inspect.signature(SamplingParams).parameters
    assert {name: ours[name].default for name in theirs} == theirs
