"""Typed options: turn the text of flags and YAML files into checked values of a dataclass's fields.

An option's type is its annotation, `Annotated[type, "help text"]`; the types understood are bool, int, float, str,
Path, Literal, tuple[str, ...] and unions of them. Errors are ValueErrors of one line.
"""

import argparse
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn


@dataclass(frozen=True)
class Range:
    """Limits of a number: `low <= x <= high` (`low < x` when `above`) and x a multiple of `step`."""

    low: float
    high: float = math.inf
    above: bool = False
    step: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, or None."""
        if not math.isfinite(value):
            return "must be a finite number"
        if value < self.low or (self.above and value == self.low):
            return f"must be {'above' if self.above else 'at least'} {self.low}"
        if value > self.high:
            return f"must be at most {self.high}"
        if self.step is not None and value % self.step:
            return f"must be a multiple of {self.step}"
        return None


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Number = Annotated[float, Range(-math.inf)]
NotNegative = Annotated[float, Range(0.0)]
Positive = Annotated[float, Range(0.0, above=True)]
Share = Annotated[float, Range(0.0, 1.0)]
Pixels = Annotated[int, Range(16, step=16)]
Precision = Literal["bfloat16", "float32"]


def convert(value: Any, hint: Any, comma_list: bool = False) -> Any:
    """`value`, from a flag (text) or a YAML file, as the type that `hint` asks for.

    A whole number may stand for a float; nothing else is guessed: "1.5" is no int, and a YAML number is no text (a git
    revision of digits needs quotes). A text given for a tuple is split at commas if `comma_list`, else its one element.

    Raises ValueError that reads on from the option's name: "must be a whole number, got 'abc'".
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = convert(value, arguments[0], comma_list)
        problems = [limit.problem(value) for limit in arguments[1:] if isinstance(limit, Range) and value is not None]
        for problem in filter(None, problems):
            raise ValueError(f"{problem}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return convert_union(value, arguments, comma_list)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        guess = did_you_mean(str(value), arguments)
        raise ValueError(f"must be one of {', '.join(arguments)}, got {value!r}{guess}")
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if comma_list else [value]
        if isinstance(value, (list, tuple)) and all(isinstance(part, str) and part for part in value):
            return tuple(value)
        raise ValueError(f"must be a list of texts, none of them empty, got {value!r}")
    return convert_plain(value, hint)


def convert_union(value: Any, members: tuple[Any, ...], comma_list: bool) -> Any:
    """The first member of a union that takes `value`; for a union with None, None and the text "null" are None."""
    if type(None) in members:
        if value is None or value == "null":
            return None
        members = tuple(member for member in members if member is not type(None))
    messages = []
    for member in members:
        try:
            return convert(value, member, comma_list)
        except ValueError as error:
            messages.append(str(error).removesuffix(f", got {value!r}"))
    raise ValueError(f"{' or '.join(messages)}, got {value!r}")


def convert_plain(value: Any, kind: type) -> Any:
    """`value` as bool, int, float, str or Path."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise ValueError(f"must be true or false, got {value!r}")
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
            return int(value)
        raise ValueError(f"must be a whole number, got {value!r}")
    if kind is float:
        # PyYAML reads 1e-4 (no dot) as text
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
        raise ValueError(f"must be a number, got {value!r}")
    if kind is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value).expanduser()
    if kind is str and isinstance(value, (str, Path)):
        return str(value)
    quotes = "; put it in quotes" if isinstance(value, (int, float)) else ""
    raise ValueError(f"must be {'a path' if kind is Path else 'text'}, got {value!r}{quotes}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


class FlagParser(argparse.ArgumentParser):
    """argparse, but a wrong flag raises ValueError instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def add_flag(group: argparse._ArgumentGroup, name: str, hint: Any, default: str, comma_list: bool) -> None:
    """Add `--name` to a group of --help; its value stays text, for `convert`.

    A bool may stand alone; a list that is not split at commas takes several values and may be repeated.
    """
    kind, *notes = typing.get_args(hint)
    extra: dict[str, Any] = {"metavar": metavar(kind)}
    if kind is bool:
        extra |= {"nargs": "?", "const": "true"}
    elif typing.get_origin(kind) is tuple and not comma_list:
        extra |= {"nargs": "+", "action": "extend"}
    text = next(note for note in reversed(notes) if isinstance(note, str))
    group.add_argument(f"--{name}", help=(f"{text} [{default}]" if default else text).replace("%", "%%"), **extra)


def metavar(kind: Any) -> str:
    """What stands for the value in --help: the choices, or the type."""
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    members = [member for member in typing.get_args(kind) or (kind,) if member not in (type(None), ...)]
    if typing.get_origin(kind) is Annotated:
        members = members[:1]
    if len(members) > 1:
        return "|".join(metavar(member).strip("{}").replace(",", "|") for member in members)
    if members[0] is not kind:
        return metavar(members[0])
    return {bool: "true|false", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def read_yaml(path: Path, hints: dict[str, Any], comma_lists: Iterable[str] = ()) -> dict[str, Any]:
    """The options in the YAML file `path`, converted by `hints`.

    Raises FileNotFoundError, or ValueError for syntax, unknown or repeated names and wrong values, with the line.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if content is None or root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold lines of `name: value`, got a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key_node, _ in root.value:
        name, place = key_node.value, f"{path}, line {key_node.start_mark.line + 1}"
        if name not in hints:
            raise ValueError(f"{place}: unknown option {name!r}{did_you_mean(name, hints)}")
        if name in values:
            raise ValueError(f"{place}: {name} is given twice")
        try:
            values[name] = convert(content[name], hints[name], name in comma_lists)
        except ValueError as error:
            raise ValueError(f"{place}: {name} {error}") from None
    return values
