"""Errors of the export: each message says what was found, what was expected and what to do next."""

from collections.abc import Iterable

from rfsq.runtime.bundle.errors import RfsqError


class ExportError(RfsqError, RuntimeError):
    """A build that cannot go on; nothing is left behind at the output."""


class BuildInputError(ExportError, ValueError):
    """Settings that make no sense, or a model that no engine can hold."""


class SourceTooLargeError(BuildInputError):
    """Tables of more numbers than a generated source takes; other engines may hold them."""


class EngineBuildError(ExportError):
    """An engine that could not be built; the message quotes the compiler, the parser or the builder."""


class GateError(ExportError):
    """One or more gates or checks are red; the message lists them all."""

    exit_status = 1


def require_none(problems: Iterable[str]) -> None:
    """Raises GateError with a line for every problem, if there are any."""
    lines = list(problems)
    if lines:
        raise GateError("\n  ".join(["these checks failed, so nothing was written:", *lines]))
