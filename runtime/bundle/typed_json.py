"""The one way from JSON to dataclasses: every key and every type as declared, or an error that names the place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from .paths import shown

_T = typing.TypeVar("_T")


def build(kind: type[_T], value: Any, where: str, *, is_exact: bool = False) -> _T:
    """JSON content as `kind`: a dataclass of dataclasses, tuples, mappings, literals and plain types.

    Keys may be missing where the field has a default. is_exact: as files are spelled that have one spelling alone, a
    float with its point, and a key left out where it would be null. Raises ValueError.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: float
    ...     tags: tuple[str, ...] = ()
    >>> build(Point, {"x": 1, "tags": ["a"]}, "the point")
    Point(x=1.0, tags=('a',))
    >>> build(Point, {"x": "1"}, "the point")
    Traceback (most recent call last):
    ValueError: the point.x is '1'; expected float
    """
    return typing.cast(_T, _build(kind, value, where, is_exact))


def _build(kind: Any, value: Any, where: str, is_exact: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    # bool is an int to isinstance.
    if kind is Any or type(value) is kind:
        return value
    if origin in (types.UnionType, typing.Union):
        return _build_one_of(arguments, value, where, is_exact)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where, is_exact)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where} is {shown(value)}; expected one of {', '.join(map(str, arguments))}")
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            parts = enumerate(zip(kinds, value, strict=True))
            return tuple(_build(part, entry, f"{where}[{index}]", is_exact) for index, (part, entry) in parts)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _build(arguments[1], entry, f"{where}[{shown(key)}]", is_exact) for key, entry in value.items()}
    if kind is float and type(value) is int and not is_exact and abs(value) < 2**53:
        return float(value)
    name = kind if isinstance(kind, types.GenericAlias) else getattr(kind, "__name__", kind)
    raise ValueError(f"{where} is {shown(value)}; expected {name}")


def _build_one_of(kinds: tuple[Any, ...], value: Any, where: str, is_exact: bool) -> Any:
    """The first that fits; what the last one says where none does."""
    if value is None and types.NoneType in kinds and not is_exact:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with contextlib.suppress(ValueError):
            return _build(kind, value, where, is_exact)
    return _build(last, value, where, is_exact)


def _build_dataclass(kind: Any, value: Any, where: str, is_exact: bool) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; expected an object")
    hints, needed = _fields(kind)
    missing, unknown = sorted(needed - value.keys()), sorted(value.keys() - hints.keys())
    if missing or unknown:
        raise ValueError(f"{where} lacks the keys {missing} and has the unknown keys {shown(unknown)}")
    return kind(**{name: _build(hints[name], part, f"{where}.{name}", is_exact) for name, part in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """The type of every field, and those that have no default."""
    missing = dataclasses.MISSING
    fields = [field for field in dataclasses.fields(kind) if field.init]
    needed = (field.name for field in fields if field.default is missing and field.default_factory is missing)
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields}, frozenset(needed)
