from __future__ import annotations

import dataclasses
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minfer.cli.options import FlagGroup, config_table, engine_flags, flags_of, parse_size, sampling_flags
from minfer.config import EngineConfig, option
from minfer.errors import ConfigError, RequestError
from minfer.sampling_params import SamplingParams
from minfer.server.options import ServerOptions

CLASSES = [EngineConfig, SamplingParams, ServerOptions]


def defaults(group: FlagGroup) -> dict:
    """What typer hands over when no flag is given."""
    return {p.name: "m" if p.name == "model" else p.default.default for p in group.parameters()}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_a_flag(cls: type) -> None:
    names = {f.name for f in dataclasses.fields(cls) if f.init} - {"bad_word_token_ids", "grammar"}
    assert {flag.name for flag in flags_of(cls)} == names
    assert all(flag.help for flag in flags_of(cls))


@pytest.mark.parametrize("cls", CLASSES)
def test_absent_flags_give_the_defaults_of_the_fields(cls: type) -> None:
    group = FlagGroup(cls, "panel")
    given = defaults(group)
    expected = cls(model="m") if cls is EngineConfig else cls()
    assert group.build(given) == expected
    assert given == {}  # every value was used


def test_a_field_that_cannot_be_a_flag_is_refused() -> None:
    @dataclasses.dataclass
    class Unexplained:
        x: int = 0

    @dataclasses.dataclass
    class Untypable:
        x: object = option(None, "anything")

    with pytest.raises(TypeError, match="'x' has no help"):
        flags_of(Unexplained)
    with pytest.raises(TypeError, match="'x' has the type"):
        flags_of(Untypable)


def test_spellings() -> None:
    parameters = {p.name: p for p in engine_flags().parameters()}
    assert parameters["max_model_len"].default.param_decls == ("--max-model-len",)
    assert parameters["prefix_caching"].default.param_decls == ("--prefix-caching/--no-prefix-caching",)
    assert parameters["kv_cache_memory"].default.metavar == "SIZE"
    assert parameters["dtype"].default.metavar == "auto|bfloat16|float16|float32"
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())


def test_groups_leave_out_choose_and_change_defaults() -> None:
    assert "seed" not in {f.name for f in engine_flags(leave_out=["seed"]).flags()}
    assert [f.name for f in engine_flags(only=["device"]).flags()] == ["device"]
    group = sampling_flags(max_tokens=99)
    assert group.build(defaults(group)).max_tokens == 99


def test_repeated_flags() -> None:
    group = sampling_flags()
    values = defaults(group) | {"stop": ["a", "b"], "stop_token_ids": [3], "logit_bias": ["5=-1.5", "6=2"], "bad_words": ["x"]}
    params = group.build(values)
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert dict(params.logit_bias or {}) == {5: -1.5, 6: 2.0}
    assert params.bad_words == ("x",)


def test_a_bad_value_is_the_dataclass_own_complaint() -> None:
    group = sampling_flags()
    with pytest.raises(RequestError, match="top_p"):
        group.build(defaults(group) | {"top_p": 2.0})


@pytest.mark.parametrize("bad", ["5", "a=1", "5=x", "=", ""])
def test_a_bad_bias_names_the_flag(bad: str) -> None:
    group = sampling_flags()
    with pytest.raises(ConfigError, match="--logit-bias"):
        group.build(defaults(group) | {"logit_bias": [bad]})


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("1K", 1024), ("1.5M", 3 << 19), ("2G", 2 << 30), ("2GiB", 2 << 30), ("2gb", 2 << 30), ("1T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 50))
def test_whole_numbers_of_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}K") == size * 1024


@pytest.mark.parametrize("text", ["", "G", "x", "1X", "1.5", "infG", "nanM", "1 2"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "7", 7),
        ("seed", "none", None),
        ("ignore_eos", "on", True),
        ("skip_special_tokens", "False", False),
        ("stop", "the end", ("the end",)),
        ("stop_token_ids", "1 2", (1, 2)),
        ("logit_bias", "1=2 3=4", {1: 2.0, 3: 4.0}),
    ],
)
def test_values_by_name(name: str, text: str, value: object) -> None:
    flags = {flag.name: flag for flag in flags_of(SamplingParams)}
    assert flags[name].parse(text) == value


@pytest.mark.parametrize(("name", "text"), [("temperature", "hot"), ("top_k", "1.5"), ("ignore_eos", "maybe"), ("temperature", "none")])
def test_bad_values_by_name(name: str, text: str) -> None:
    flags = {flag.name: flag for flag in flags_of(SamplingParams)}
    with pytest.raises(ConfigError, match=name):
        flags[name].parse(text)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_table_has_a_row_for_each_field(cls: type) -> None:
    rows = config_table(cls).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [flag.name for flag in flags_of(cls)]
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_the_form_of_an_answer_is_json_at_a_shell() -> None:
    (flag,) = [flag for flag in flags_of(SamplingParams) if flag.name == "structured_outputs"]
    assert flag.value('{"choice": ["a", "b"]}') == {"choice": ["a", "b"]}
    assert flag.value(None) is None
    for text, complaint in (("{", "is not JSON"), ("[1]", "takes a JSON object")):
        with pytest.raises(ConfigError, match=complaint):
            flag.value(text)
