"""Which folders were made here: known by a secret that lies in them, never by a name alone.

Whoever clears up after a killed run must not take a stranger's folder for its own. So a folder that is worked in gets a
marker with a random key, and what is made in it bears names that only this key gives.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TEXT = "made by rfsq-deploy for work in progress, key {key} check {check}\n"
_BEGINNING = _TEXT.partition("{")[0].encode()
_PATTERN = re.compile(_TEXT.format(key="([0-9a-f]{32})", check="([0-9a-f]{16})"))
_SIZE_LIMIT = 1024
_SUM_DIGITS = 16


@dataclass(frozen=True)
class Ownership:
    """key: 32 hexadecimal digits, another for every folder."""

    key: str

    @classmethod
    def begin(cls, marker: Path) -> Ownership:
        """Write the marker, and have it on the disk before anything is made beside it. Raises OSError."""
        ownership = cls(os.urandom(16).hex())
        try:
            with marker.open("wb") as file:
                file.write(_TEXT.format(key=ownership.key, check=ownership.check("marker")).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # A part of a marker would be nobody's.
            with suppress(OSError):
                marker.unlink()
            raise
        return ownership

    @classmethod
    def read(cls, marker: Path) -> Ownership | None:
        """None where the marker is missing, or none of ours. Raises OSError."""
        found = _PATTERN.fullmatch((_content(marker) or b"").decode("ascii", "replace"))
        return cls(found[1]) if found and found[2] == cls(found[1]).check("marker") else None

    @classmethod
    def is_unfinished(cls, marker: Path) -> bool:
        """Whether `begin` was killed in it, or lost its power: it is empty, or a part. Raises OSError."""
        text = _content(marker)
        is_part = text is not None and (not text.strip(b"\0") or text.startswith(_BEGINNING))
        return is_part and cls.read(marker) is None

    def name(self, what: str) -> str:
        """What to call the entry for `what`: hexadecimal digits or a word."""
        return f"{what}-{self.check(what)}"

    def owns(self, name: str) -> bool:
        """Whether this key gave the name."""
        what, _, found = name.rpartition("-")
        return hmac.compare_digest(os.fsencode(found), self.check(what).encode())

    def check(self, what: str) -> str:
        """What only this key gives for `what`: 16 hexadecimal digits."""
        return hmac.new(self.key.encode(), os.fsencode(what), hashlib.sha256).hexdigest()[:_SUM_DIGITS]


def _content(marker: Path) -> bytes | None:
    """None where there is no file. A pipe, say, is no marker, and reading it would wait for ever."""
    if marker.is_symlink() or not marker.is_file():
        return None
    with marker.open("rb") as file:
        return file.read(_SIZE_LIMIT)
