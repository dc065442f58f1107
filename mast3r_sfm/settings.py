"""From tables of texts and numbers to dataclasses of settings, and back: what knows types, and no setting."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mast3r_sfm.errors import ConfigError


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def toml_value(value: object) -> str:
    """A number, truth value or text as TOML writes it."""
    # JSON writes numbers, booleans and text as TOML does, except for its escapes of characters such as 𝄞.
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class Untyped(str):
    """A value that came as text and is still to be parsed by the type of its setting."""


def build(cls: type, values: Mapping[str, object], prefix: str = "") -> Any:
    """A dataclass of settings, and those in it, from nested tables.

    Raises:
        ConfigError: a name is unknown, or a value does not fit its type; the message says where, as `prefix` and name.
    """
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"there is no setting {prefix}{name}; {hint}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a stage; set one of its keys, as {prefix}{name}.key=value")
            arguments[name] = build(hints[name], value, f"{prefix}{name}.")
        else:
            arguments[name] = _parse(value, hints[name], f"{prefix}{name}")
    return cls(**arguments)


def _parse(value: object, kind: Any, name: str) -> object:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return str(value)
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(map(str, get_args(kind)))}")
    if get_origin(kind) in (Union, types.UnionType):
        inner = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None or value == Untyped("none") else _parse(value, inner[0], name)
    if kind is bool and isinstance(value, Untyped) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind in (int, float) and isinstance(value, Untyped):
        try:
            return kind(value)
        except ValueError as error:
            raise ConfigError(f"{name} = {str(value)!r}: must be a number of type {kind.__name__}") from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return str(value) if kind is str else value
    raise ConfigError(f"{name} = {value!r}: must be of type {kind.__name__}")
