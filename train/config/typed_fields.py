"""Typed options: turn the text of flags and YAML files into checked values of a dataclass's fields.

An option's type is its annotation, `Annotated[type, "help text"]`, with limits from annotated_types in between; pydantic
converts and checks. Ours are only the reading of YAML with the line of each name, which pydantic never sees, "did you
mean", and the wording: pydantic's report takes three lines a field, and users get one. Errors are ValueErrors.
"""

import argparse
import difflib
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from annotated_types import Ge, Gt, Interval, MultipleOf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from files.shown import shown

MOST = 2**31 - 1  # of anything counted: beyond it are typing errors, on which libraries fail in ways of their own
LARGEST_WHOLE = 2**40  # a seed is multiplied by a million in 64 bits
Count = Annotated[int, Interval(ge=1, le=MOST)]
Whole = Annotated[int, Interval(ge=0, le=LARGEST_WHOLE)]
Number = Annotated[float, "finite"]
NotNegative = Annotated[float, Ge(0.0)]
Positive = Annotated[float, Gt(0.0)]
Share = Annotated[float, Interval(ge=0.0, le=1.0)]
Pixels = Annotated[int, Ge(16), MultipleOf(16)]
Precision = Literal["bfloat16", "float32"]

# pydantic's kinds of errors in our words, which read on from the option's name: what has another type, and what has it
# but passes a limit
WORDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a shorter number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "is_instance_of": "must be a path",
    "path_type": "must be a path",
}
LIMITS = {
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "multiple_of": "must be a multiple of {multiple_of}",
}


def convert(value: Any, hint: Any, comma_list: bool = False) -> Any:
    """`value`, from a flag (text) or a YAML file, as the type that `hint` asks for.

    Text is parsed (PyYAML too reads 1e-4, without a dot, as text), everything else must have the type already, but that a
    whole number may stand for a float: "1.5" is no int, and a YAML number is no text (a git revision of digits needs
    quotes). Where None is allowed the text "null" is None. A text given for a tuple is split at commas if `comma_list`,
    else its one element.

    Raises ValueError that reads on from the option's name: "must be a whole number, got 'abc'".
    """
    kinds = plain_types(hint)
    given = str(value) if isinstance(value, Path) else value
    if type(None) in kinds and given in (None, "null"):
        return None
    if tuple in kinds:
        if isinstance(given, str):
            given = [part.strip() for part in given.split(",")] if comma_list else [given]
        given = tuple(given) if isinstance(given, list) else given
    if bool in kinds and isinstance(given, str) and given not in ("true", "false"):  # pydantic takes "yes" and "1" too
        raise ValueError(f"must be true or false, got {shown(repr(value))}")
    if Path in kinds and given == "":  # Path("") is the working directory
        raise ValueError(f"must be a path, got {value!r}")
    try:
        adapter = adapter_of(hint)
        read = adapter.validate_strings if isinstance(given, str) else adapter.validate_python
        found = read(given, strict=True)
    except ValidationError as error:
        raise ValueError(one_sentence(error, kinds, value)) from None
    return found.expanduser() if isinstance(found, Path) else found


@cache
def adapter_of(hint: Any) -> TypeAdapter[Any]:
    """pydantic's reader of one type: finite numbers only, no empty texts in lists."""
    limits = ConfigDict(allow_inf_nan=False)
    if tuple in plain_types(hint):
        limits["str_min_length"] = 1
    return TypeAdapter(hint, config=limits)


def plain_types(hint: Any) -> dict[Any, tuple[str, ...]]:
    """The types that `hint` names, annotations stripped, unions taken apart; a Literal with its choices."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return plain_types(arguments[0])
    if origin is Literal:
        return {Literal: arguments}
    if origin is tuple or not arguments:
        return {origin or hint: ()}
    return {kind: choices for member in arguments for kind, choices in plain_types(member).items()}


def one_sentence(error: ValidationError, kinds: dict[Any, tuple[str, ...]], value: Any) -> str:
    """Pydantic's errors (one for each member of a union) as what reads on from the option's name."""
    if tuple in kinds:
        return f"must be a list of texts, none of them empty, got {shown(repr(value))}"
    problems: dict[str, None] = {}  # in their order, each once
    hint = ""
    for each in error.errors(include_url=False):
        if each["type"] == "literal_error":
            problems[f"must be one of {', '.join(kinds[Literal])}"] = None
            hint = did_you_mean(str(value), kinds[Literal])
        elif each["type"] in LIMITS:
            problems[LIMITS[each["type"]].format(**each.get("ctx", {}))] = None
        else:
            problems[WORDS.get(each["type"]) or each["msg"].replace("Input should be", "must be")] = None
        if each["type"] == "string_type" and isinstance(value, (int, float)):
            hint = "; put it in quotes"
    a_number = all(each["type"] in LIMITS for each in error.errors())
    return f"{' or '.join(problems)}, got {shown(value if a_number else repr(value))}{hint}"


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
