"""What TensorRT says while it works: collected by whoever asks, and handed to Python's logging."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_LOG = logging.getLogger(__name__)

#: All others, `INFO` and `VERBOSE`, are for debugging.
_LEVELS = {"INTERNAL_ERROR": logging.CRITICAL, "ERROR": logging.ERROR, "WARNING": logging.WARNING}


@dataclass(frozen=True)
class LogMessage:
    """One message of TensorRT; `severity` is its own word, such as `WARNING`."""

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.severity in ("ERROR", "INTERNAL_ERROR")


class MessageHub:
    """Hands each message of TensorRT to everyone who is collecting at that moment, and to Python's logging.

    Collectors judge and quote what they collect, so while there is one the log has it for debugging alone.
    """

    def __init__(self) -> None:
        self._collections: list[list[LogMessage]] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[LogMessage]]:
        messages: list[LogMessage] = []
        self._collections.append(messages)
        try:
            yield messages
        finally:
            self._collections = [kept for kept in self._collections if kept is not messages]

    def emit(self, severity: str, text: str) -> None:
        for messages in self._collections:
            messages.append(LogMessage(severity, text))
        level = logging.DEBUG if self._collections else _LEVELS.get(severity, logging.DEBUG)
        _LOG.log(level, "TensorRT %s: %s", severity, text)

    def logger_of(self, module: Any) -> Any:
        """An `ILogger` of TensorRT's Python module that hands everything to this hub."""
        hub = self

        class ForwardingLogger(module.ILogger):  # type: ignore[misc]  # the vendor module has no types
            def __init__(self) -> None:
                # pybind11 rejects an object whose base was initialised through super().
                module.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                # TensorRT calls this from C++ code that cannot take an exception: it would end the process.
                with contextlib.suppress(Exception):
                    hub.emit(severity.name, text)

        return ForwardingLogger()


def quote(messages: Sequence[LogMessage]) -> str:
    """Its errors, each once."""
    return " | ".join(dict.fromkeys(message.text for message in messages if message.is_error))


def lacks_device(messages: Sequence[LogMessage]) -> bool:
    """Whether CUDA stopped TensorRT: its error comes first; after a faulty engine's own error it only follows."""
    first = next((message.text for message in messages if message.is_error), "")
    return re.search(r"cudaError|Cuda Runtime|CUDA (initialization|driver)", first) is not None
