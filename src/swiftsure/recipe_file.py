"""Recipes as YAML: read strictly, with one line for whatever does not fit, and written whole."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from swiftsure.errors import InputError
from swiftsure.recipe import Recipe, option_names
from swiftsure.suggestion import unknown

_FREE = ("model.options", "exits.at")
"""Keys whose value is a table of the user's own: what is in it is for the builder to judge."""
_MODULES = "exits.at"
"""Of these, the one whose keys are names of modules, with dots in them."""
_NULLABLE = ("exits",)
"""Sections that may be null: all their keys have their defaults then."""


class _StrictLoader(yaml.SafeLoader):
    """YAML as people write it: a key given twice is an error, and 1e-3 is a number (YAML 1.1 wants 1.0e-3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise InputError(f"line {node.value[number][0].start_mark.line + 1}: {key!r} is given twice")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def packaged() -> list[str]:
    """The names of the recipes that come with swiftsure."""
    folder = resources.files("swiftsure") / "recipes"
    if not folder.is_dir():
        return []
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or from those that come with swiftsure by name; what it leaves out has its default.

    Args:
        source: a YAML file, or one of ``packaged()``.
        overrides: "key=value" lines that win over the file, such as "loss.mixing.gate=0.8".

    Raises:
        InputError: no such file, broken YAML, an unknown key, a value of the wrong type or out of range.
    """
    return parse(_text(source), str(source), overrides)


def read_packaged(name: str) -> Recipe:
    """A recipe that comes with swiftsure, whatever files lie in the working directory. Errors as in `read`."""
    if name not in packaged():
        raise InputError(unknown("recipe", name, packaged()))
    return parse(_packaged_text(name), name)


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text; ``source`` names it in errors. See `read`."""
    try:
        values = _table(text)
        _check_keys(values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    for override in overrides:
        _override(values, override)
    try:
        return _typed(values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out; `parse` reads back an equal one."""
    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def first_difference(before: Recipe, after: Recipe) -> tuple[str, Any, Any] | None:
    """The first key in which two recipes differ, with both values; None where they are equal."""
    pairs = zip(_leaves(before.as_dict()), _leaves(after.as_dict()), strict=True)
    return next(((key, old, new) for (key, old), (_, new) in pairs if old != new), None)


def _packaged_text(name: str) -> str:
    return (resources.files("swiftsure") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _text(source: str | Path) -> str:
    path = Path(source)
    if not path.exists() and str(source) in packaged():
        return _packaged_text(str(source))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name.removesuffix(".yaml"), packaged(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}, which comes with swiftsure?" if near else "give a YAML file"
        raise InputError(f"recipe {source} does not exist; {hint}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {source} is no text file; allowed: YAML in UTF-8") from None
    except OSError as error:
        raise InputError(f"recipe {source} cannot be read: {error.strerror}") from None


def _table(text: str) -> dict[Any, Any]:
    try:
        values = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"this is not YAML: {_yaml_fault(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        allowed = ", ".join(field.name for field in fields(Recipe))
        raise InputError(f"this is no recipe; allowed: a table with the keys {allowed}")
    return values


def _yaml_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + " ".join(str(getattr(error, "problem", None) or error).split())


def _check_keys(values: dict[Any, Any], kind: type = Recipe, prefix: str = "") -> None:
    """Refuse unknown keys, and plain values where a section belongs."""
    example = kind()
    known = {field.name: getattr(example, field.name) for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise InputError(_unknown_key(f"{prefix}{key}", [prefix + name for name in known]))
        if is_dataclass(known[key]) and not (value is None and f"{prefix}{key}" in _NULLABLE):
            if not isinstance(value, dict):
                inside = ", ".join(field.name for field in fields(known[key]))
                raise InputError(f"{prefix}{key} is {value!r}; allowed: a table with the keys {inside}")
            _check_keys(value, type(known[key]), f"{prefix}{key}.")


def _unknown_key(key: str, siblings: Sequence[str]) -> str:
    # A key of the same section first; then one that only stands in the wrong section.
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.8)
    last = key.rpartition(".")[2]
    elsewhere = [name for name in option_names() if name.rpartition(".")[2] == last]
    if near or not elsewhere:
        return unknown("key", key, near or siblings)
    return f"unknown key {key!r}; did you mean {elsewhere[0]!r}?"


def _override(values: dict[Any, Any], override: str) -> None:
    """Set one "key=value" in nested tables."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"--set {override!r} is no setting; allowed: key=value, such as loss.k=1")
    known = option_names()
    if key not in known and not key.startswith(tuple(f"{name}." for name in _FREE)):
        sections = {name[: match.start()] for name in known for match in re.finditer(r"\.", name)}
        if key in sections:
            inside = [name for name in known if name.startswith(f"{key}.")]
            raise InputError(f"--set {key} is a section; set one of its keys: {', '.join(inside)}")
        section = key.rpartition(".")[0]
        siblings = [name for name in known if name.rpartition(".")[0] == section] if section else []
        siblings = siblings or [field.name for field in fields(Recipe)]
        raise InputError(f"--set: {_unknown_key(key, siblings)}")
    try:
        value = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, InputError) as error:
        fault = _yaml_fault(error) if isinstance(error, yaml.YAMLError) else error
        raise InputError(f"--set {override!r} is not YAML: {fault}") from None
    *path, last = key.split(".")
    if key.startswith(f"{_MODULES}."):
        path, last = _MODULES.split("."), key.removeprefix(f"{_MODULES}.")
    for name in path:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
    values[last] = value


def _typed(values: dict[str, Any]) -> Recipe:
    """The dataclass of nested plain values, whose keys are known to be right."""
    values = {key: value for key, value in values.items() if value is not None or key not in _NULLABLE}
    values = _with_module_names(values)
    for key, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} is {value}; allowed: a finite number")
    ball = values.get("ball", {})
    if type(ball.get("norm")) is int:
        # YAML reads "norm: 2" as a number; asking for quotes there would be pedantry.
        values = {**values, "ball": {**ball, "norm": str(ball["norm"])}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        recipe = Recipe(**vars(parser.instantiate(parser.parse_object(values))))
    except ArgumentError as error:
        raise InputError(_type_fault(error, values)) from None
    return recipe


def _with_module_names(values: dict[str, Any]) -> dict[str, Any]:
    """YAML reads the name of a module of a Sequential, such as 2, as a number."""
    section, name = _MODULES.split(".")
    table = values.get(section, {}).get(name)
    if not isinstance(table, dict):
        return values
    for key in table:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise InputError(f"{_MODULES} has the key {key!r}; allowed: names of modules, in quotes: '{key}'")
    return {**values, section: {**values[section], name: {str(key): head for key, head in table.items()}}}


def _type_fault(error: ArgumentError, values: dict[str, Any]) -> str:
    """One line for what jsonargparse says in several: the key, what stands there and what is allowed."""
    text = str(error)
    match = re.search(r'key "([\w.]+)"', text)
    if match is None:
        return " ".join(text.split())
    key, kind, value = match.group(1), Recipe, values
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
        value = value[name]
    return f"{key} is {value!r}; allowed: {_in_words(kind)}"


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
}


def _in_words(kind: Any) -> str:
    """A type as a reader of YAML knows it: "an integer or null"."""
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return f"a list, each {_in_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "a table"
    if isinstance(kind, type) and kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is Union or get_args(kind):
        return " or ".join(_in_words(one) for one in get_args(kind))
    return str(kind)


def _leaves(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value; a table of the user's own counts as one value."""
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _FREE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
