"""Command-line flags made from dataclass fields, so that a setting, its default and its meaning are written once.

    ENGINE = FlagGroup(EngineConfig, "Engine")
    ENGINE.parameters()         what typer is told: --max-model-len INTEGER, --prefix-caching/--no-prefix-caching, ...
    ENGINE.build(values)        typer's values -> EngineConfig, which does all further checking

A field's type says how it is typed at a shell: a number, a text, a yes or no, a size with suffix K, M or G (metadata `bytes`), or
a flag that may be repeated (sequences, and mappings as KEY=VALUE). `SamplingParams` carries no help texts, since they aren't
needed where it is used as an API; they are here, and a field without one is an error.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import typer

from minfer.config import EngineConfig
from minfer.errors import ConfigError
from minfer.sampling_params import SamplingParams
from minfer.structured_outputs import StructuredOutputsParams

Kind = Literal["bool", "int", "float", "str", "size", "strings", "ints", "biases", "pairs", "json"]
T = TypeVar("T")

_SUFFIXES = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SHELL_TYPES: dict[Kind, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "ints": list[int],
    "strings": list[str],
    "biases": list[str],
    "pairs": list[str],
}
_SAMPLING_HELP = {
    "n": "How many answers to make.",
    "max_tokens": "Most tokens to generate.",
    "min_tokens": "Tokens to generate before the text may end.",
    "temperature": "Randomness; 0 takes the most likely token.",
    "top_k": "Sample among the k most likely tokens (0: all).",
    "top_p": "Sample among the likeliest tokens that together have this probability.",
    "min_p": "Drop tokens less likely than this share of the likeliest one.",
    "typical_p": "Sample among the most typical tokens that together have this probability.",
    "repetition_penalty": "Divides the scores of tokens seen so far; above 1 discourages repetition.",
    "presence_penalty": "Taken off the score of each token generated so far, once.",
    "frequency_penalty": "Taken off the score of each token generated so far, per occurrence.",
    "logit_bias": "Added to a token's score, as ID=BIAS. May be repeated.",
    "bad_words": "A text that must not be generated. May be repeated.",
    "stop": "A text that ends the answer. May be repeated.",
    "stop_token_ids": "A token id that ends the answer. May be repeated.",
    "include_stop_str_in_output": "Keep the stop text at the end of the answer.",
    "ignore_eos": "Go on after the model's end-of-text token.",
    "seed": "Same seed, same answer (default: fresh entropy).",
    "logprobs": "Log-probabilities of this many alternatives to each token.",
    "prompt_logprobs": "The same for the tokens of the prompt.",
    "structured_outputs": 'The form of the answer, as JSON: one of {"json": SCHEMA}, {"regex": ...}, {"choice": [...]}, {"grammar": ...}.',
    "skip_special_tokens": "Leave special tokens out of the text.",
}
_FILLED_BY_THE_ENGINE = frozenset({"bad_word_token_ids", "grammar"})


@dataclass(frozen=True)
class Flag:
    """One field as a flag. `name` is the field's; `default` the value where the flag is absent."""

    name: str
    kind: Kind
    help: str
    default: Any
    optional: bool = False  # None is a value of the field
    choices: tuple[str, ...] = ()
    positional: bool = False

    @property
    def spelling(self) -> str:
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    def parameter(self, panel: str) -> inspect.Parameter:
        """The parameter of a typer function that this flag is."""
        base = _SHELL_TYPES.get(self.kind, str)
        more: dict[str, Any] = {"help": self.help.replace("[", r"\["), "rich_help_panel": panel}
        if self.choices:
            more["metavar"] = "|".join(self.choices)
        elif self.kind == "size":
            more["metavar"] = "SIZE"
        elif self.kind in ("biases", "pairs", "json"):
            more["metavar"] = {"biases": "ID=BIAS", "pairs": "NAME=VALUE", "json": "JSON"}[self.kind]
        if self.positional:
            del more["rich_help_panel"]
            return self._parameter(typer.Argument(..., show_default=False, **more), base)
        if self.kind == "bool":
            return self._parameter(typer.Option(self.default, f"{self.spelling}/--no-{self.spelling[2:]}", **more), base)
        if self.kind in ("strings", "ints", "biases", "pairs"):
            return self._parameter(typer.Option([], self.spelling, show_default=False, **more), base)
        default = str(self.default) if self.kind == "size" and self.default is not None else self.default
        return self._parameter(typer.Option(default, self.spelling, **more), base | None)

    def _parameter(self, default: Any, annotation: Any) -> inspect.Parameter:
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def value(self, given: Any) -> Any:
        """What typer read -> what the field wants. Raises ConfigError naming the flag."""
        if self.kind == "size" and given is not None:
            return parse_size(given, self.spelling)
        if self.kind == "biases":
            return dict(_parse_bias(item, self.spelling) for item in given) or self.default
        if self.kind == "pairs":
            return _parse_pairs(given, self.spelling) or self.default
        if self.kind in ("strings", "ints"):
            return tuple(given) or self.default
        if self.kind == "json" and given is not None:
            return _parse_json(given, self.spelling)
        return given

    def parse(self, text: str) -> Any:
        """One value from one piece of text, for where flags are set by name (`/set` in the chat). Raises ConfigError."""
        if self.optional and text.lower() == "none":
            return None
        try:
            if self.kind == "bool":
                return {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}[text.lower()]
            if self.kind in ("int", "float"):
                return int(text) if self.kind == "int" else float(text)
            if self.kind == "ints":
                return tuple(int(item) for item in text.split())
        except (KeyError, ValueError) as error:
            wanted = {"bool": "on or off", "int": "a whole number", "float": "a number", "ints": "whole numbers"}[self.kind]
            raise ConfigError(f"{self.name} takes {wanted}, not {text!r}") from error
        if self.kind in ("strings", "biases", "pairs"):
            return self.value([text] if self.kind == "strings" else text.split())
        return self.value(text)


@dataclass(frozen=True)
class FlagGroup(Generic[T]):
    """The flags of one dataclass. `leave_out` are fields that a command sets itself; `defaults` differ from the fields' own."""

    cls: type[T]
    panel: str
    leave_out: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def flags(self) -> list[Flag]:
        return [
            dataclasses.replace(flag, default=self.defaults.get(flag.name, flag.default))
            for flag in flags_of(self.cls)
            if flag.name not in self.leave_out and (self.only is None or flag.name in self.only)
        ]

    def parameters(self) -> list[inspect.Parameter]:
        return [flag.parameter(self.panel) for flag in self.flags()]

    def build(self, values: dict[str, Any]) -> T:
        """Takes this group's values out of `values`. Raises what the dataclass raises for bad ones."""
        return self.cls(**{flag.name: flag.value(values.pop(flag.name)) for flag in self.flags()})


def engine_flags(*, leave_out: Iterable[str] = (), only: Iterable[str] | None = None, **defaults: Any) -> FlagGroup[EngineConfig]:
    return FlagGroup(EngineConfig, "Engine", frozenset(leave_out), None if only is None else frozenset(only), defaults)


def sampling_flags(*, leave_out: Iterable[str] = (), **defaults: Any) -> FlagGroup[SamplingParams]:
    """`SamplingParams` has a seed too, so a command that takes both groups leaves out the engine's."""
    return FlagGroup(SamplingParams, "Sampling", frozenset(leave_out), defaults=defaults)


def flags_of(cls: type) -> list[Flag]:
    """A flag for each field of a dataclass, in order. Raises TypeError for a field whose type has no spelling at a shell."""
    hints = typing.get_type_hints(cls)
    return [_flag(f, hints[f.name]) for f in dataclasses.fields(cls) if f.init and f.name not in _FILLED_BY_THE_ENGINE]


def _flag(f: dataclasses.Field[Any], hint: Any) -> Flag:
    text = f.metadata.get("help") or _SAMPLING_HELP.get(f.name)
    if text is None:
        raise TypeError(f"the field {f.name!r} has no help text, so no flag can be made of it")
    kind, choices, optional = _kind(f.name, hint)
    if f.metadata.get("bytes"):
        kind = "size"
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    return Flag(f.name, kind, text, default, optional, choices, bool(f.metadata.get("positional")))


def _kind(name: str, hint: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """(how it is typed, choices, may be None) of an annotation."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in members
    if StructuredOutputsParams in members:
        return "json", (), optional
    for member in members:
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is Literal:
            return "str", arguments, optional
        if origin is not None and issubclass(origin, Mapping):
            return ("biases" if arguments[0] is int else "pairs"), (), optional
        if origin is not None and issubclass(origin, Sequence):
            return ("ints" if arguments[0] is int else "strings"), (), optional
    for kind in (bool, int, float, str):
        if kind in members:
            return kind.__name__, (), optional  # type: ignore[return-value]
    raise TypeError(f"the field {name!r} has the type {hint}, which has no spelling on a command line")


def parse_size(text: str, flag: str = "a size") -> int:
    """Bytes: a whole number, or one with the suffix K, M, G or T (powers of 1024; "GB" and "GiB" mean the same)."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = _SUFFIXES.get(number[-1:], 1)
    try:
        size = float(number.removesuffix(number[-1:])) * factor if factor > 1 else int(number)
        return int(size)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{flag} must be a number of bytes such as 800M or 2.5G, not {text!r}") from error


def _parse_json(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} takes a JSON object, and {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} takes a JSON object, not {text!r}")
    return value


def _parse_bias(text: str, flag: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise ConfigError(f"{flag} takes ID=BIAS, such as 42=-5, not {text!r}") from error


def _parse_pairs(items: Sequence[str], flag: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals or name in pairs:
            raise ConfigError(f"{flag} takes NAME=VALUE, each name once, not {item!r}")
        pairs[name] = value
    return pairs


def config_table(cls: type = EngineConfig) -> str:
    """The flags of a dataclass as a Markdown table, for the docs."""
    rows = ["| Setting | Flag | Default | Meaning |", "|---|---|---|---|"]
    for flag in flags_of(cls):
        default = "" if flag.positional or flag.default is None else f"`{flag.default}`"
        spelling = flag.spelling + (f" / --no-{flag.spelling[2:]}" if flag.kind == "bool" else "")
        choices = f" ({', '.join(flag.choices)})" if flag.choices else ""
        rows.append(f"| `{flag.name}` | `{spelling}` | {default} | {flag.help.replace('|', chr(92) + '|')}{choices} |")
    return "\n".join(rows) + "\n"
