"""The one way to read files that somebody else may have made: opened once, regular, and never more than expected.

Of JSON in them, every key stands once, and every key and every type is as a dataclass declares it, or an error names
the place.

What stands under a name may change between two looks at it, and may be a pipe that never answers, a link to elsewhere
or a sparse file of terabytes. So a file is opened first, without waiting, and everything is asked of what was opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from .errors import RfsqError
from .paths import shown

_T = typing.TypeVar("_T")
#: What a message calls the types of a field.
_WORDS: dict[Any, str] = {
    **{float: "a number", int: "an integer", str: "text", bool: "true or false"},
    **{tuple: "a list", dict: "an object", Mapping: "an object"},
}

#: Where the system lacks a flag, what is opened is compared with what the name showed before.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = getattr(os, "O_DIRECTORY", 0)
_PLAIN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
#: A pipe without a writer opens at once, and no terminal becomes the process's own.
_FILE = _PLAIN | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
#: The deepest JSON of ours is provenance, with about five.
_MOST_LEVELS = 32
_HAS_FOLDERS = bool(_NO_FOLLOW and _FOLDER and {os.open, os.stat} <= os.supports_dir_fd)


class UnfitFileError(RfsqError, OSError):
    """What stands there is no regular file, is a link, or is larger than allowed; nothing was read."""


def read_file(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes, links followed. Raises OSError."""
    with regular_file(path) as (stream, size):
        if size > most:
            raise UnfitFileError(f"it has {size} bytes; expected at most {most}")
        # The size that was checked, though the file may grow; asking for `most` would allocate all of it.
        return stream.read(size)


def read_json(path: str | Path, most: int) -> Any:
    """What `parse_json` finds in a regular file of at most `most` bytes. Raises OSError, ValueError."""
    return parse_json(read_file(path, most))


def parse_json(text: str | bytes) -> Any:
    """JSON by the standard, without NaN and infinity, each key once, of at most 32 levels. Raises ValueError."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it nests deeper than {_MOST_LEVELS} levels") from None
    _check_depth(content)
    return content


def regular_file(path: str | Path) -> contextlib.AbstractContextManager[tuple[BinaryIO, int]]:
    """A regular file, links followed, and its size in bytes; to be entered at once. Raises OSError."""
    return _regular(os.open(path, _FILE))


class OpenFolder(contextlib.AbstractContextManager["OpenFolder"]):
    """A folder that stays the one that was opened, whatever takes its name meanwhile. Nothing in it is followed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        self._descriptor = os.open(path, _PLAIN | _FOLDER) if _HAS_FOLDERS else None
        self._status = path.stat() if self._descriptor is None else os.fstat(self._descriptor)

    def is_still_there(self) -> bool:
        """Whether the name still leads to this folder."""
        try:
            return os.path.samestat(self._path.stat(), self._status)
        except OSError:
            return False

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A regular file by its path in the folder, with forward slashes, and its size in bytes. Raises OSError."""
        *parents, last = name.split("/")
        with contextlib.ExitStack() as stack:
            if self._descriptor is None:
                descriptor = self._open_by_path(name)
            else:
                folder = self._descriptor
                for parent in parents:
                    folder = _open_at(parent, _PLAIN | _FOLDER, folder)
                    stack.callback(os.close, folder)
                descriptor = _open_at(last, _FILE, folder)
            yield stack.enter_context(_regular(descriptor))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_by_path(self, name: str) -> int:
        """For systems that open nothing relative to a folder: what was opened must be what was no link before."""
        path = self._path
        for part in name.split("/"):
            path = path / part
            before = path.lstat()
            _refuse_link(before, part)
        # Refused before it is opened: opening a pipe may wait for ever.
        _refuse_irregular(before)
        descriptor = os.open(path, _FILE)
        if not os.path.samestat(os.fstat(descriptor), before):
            os.close(descriptor)
            raise UnfitFileError("it was replaced while it was opened")
        return descriptor


def _open_at(name: str, flags: int, folder: int) -> int:
    try:
        return os.open(name, flags | _NO_FOLLOW, dir_fd=folder)
    except OSError:
        # Systems differ in what they call a link that is not followed.
        _refuse_link(os.stat(name, dir_fd=folder, follow_symlinks=False), name)
        raise


@contextlib.contextmanager
def _regular(descriptor: int) -> Iterator[tuple[BinaryIO, int]]:
    """Takes the descriptor over. The size is that of this moment."""
    try:
        status = os.fstat(descriptor)
        _refuse_irregular(status)
        stream = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with stream:
        yield stream, status.st_size


def _refuse_link(status: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise UnfitFileError(f"{name} is a link, which may lead anywhere; put in its place what it leads to")


def _refuse_irregular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFileError("it is not a regular file")


def _check_depth(content: Any) -> None:
    """Goes level by level, because recursion would overflow the stack."""
    level = [content]
    for _ in range(_MOST_LEVELS):
        level = [
            part
            for node in level
            if isinstance(node, dict | list)
            for part in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise ValueError(f"it nests deeper than {_MOST_LEVELS} levels")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json alone would keep the last of two values, and another reader the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands there twice")
            seen.add(key)
    return found


# --- JSON as dataclasses ----------------------------------------------------------------------------------------------


def build(kind: type[_T], value: Any, where: str, *, is_exact: bool = False) -> _T:
    """JSON content as `kind`: a dataclass of dataclasses, tuples, mappings, literals, enums of text and plain types.

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
    ValueError: the point.x is '1'; expected a number
    """
    return typing.cast(_T, _build(kind, value, where, is_exact))


def coerce_fields(instance: Any, error: type[Exception], prepare: Callable[[Any], Any] = lambda value: value) -> None:
    """Make every field of a dataclass, frozen or not, what it is declared as. Raises `error`.

    prepare: what a value passes through before.
    """
    kind: Any = type(instance)
    for name, declared in _fields(kind)[0].items():
        try:
            object.__setattr__(instance, name, _build(declared, prepare(getattr(instance, name)), name, False))
        except ValueError as problem:
            raise error(f"{problem}: correct it") from None


def _build(kind: Any, value: Any, where: str, is_exact: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    # bool is an int to isinstance.
    if kind is Any or type(value) is kind:
        return value
    if origin in (types.UnionType, typing.Union):
        return _build_one_of(arguments, value, where, is_exact)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where, is_exact)
    if choices := _choices_of(kind):
        if isinstance(value, str | int) and value in choices:
            return choices[choices.index(value)]
        raise ValueError(f"{where} is {shown(value)}; expected one of {', '.join(map(str, choices))}")
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            places = range(len(value))
            return tuple(_build(kinds[place], value[place], f"{where}[{place}]", is_exact) for place in places)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _build(arguments[1], entry, f"{where}[{shown(key)}]", is_exact) for key, entry in value.items()}
    if kind is float and type(value) is int and not is_exact and abs(value) < 2**53:
        return float(value)
    size = f" of {len(arguments)}" if origin is tuple and arguments[-1] is not Ellipsis else ""
    form = " with a point" if kind is float and type(value) is int else size
    raise ValueError(f"{where} is {shown(value)}; expected {_WORDS.get(origin or kind, kind)}{form}")


def _choices_of(kind: Any) -> tuple[Any, ...]:
    """Of literals, or an enum of text; none of another type."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ()


def _build_one_of(kinds: tuple[Any, ...], value: Any, where: str, is_exact: bool) -> Any:
    """The first that fits; what the last one says where none does."""
    if value is None and types.NoneType in kinds and not is_exact:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with contextlib.suppress(ValueError):
            return _build(kind, value, where, is_exact)
    try:
        return _build(last, value, where, is_exact)
    except ValueError as problem:
        # What is wrong within says more than what else may stand here.
        words = [_WORDS.get(kind, str(kind)) for kind in others if str(problem).startswith(f"{where} is ")]
        raise ValueError(" or ".join([str(problem), *words])) from None


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
