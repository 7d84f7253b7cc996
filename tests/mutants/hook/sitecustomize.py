"""Puts a mutant in the place of its module, in the process of the tests and in every Python that they start.

RFSQ_MUTANT is `module:file`; Python itself imports this module where its folder is on PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType


class MutantLoader(SourceFileLoader):
    """Compiles another source than the file it names, and keeps no bytecode of it."""

    def __init__(self, module: str, path: str, source: Path) -> None:
        super().__init__(module, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source.read_bytes(), self.get_filename(fullname), "exec", dont_inherit=True)


class MutantFinder(MetaPathFinder):
    def __init__(self, module: str, source: Path) -> None:
        self._module, self._source = module, source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self._module else None
        if spec is not None and spec.origin is not None:
            spec.loader = MutantLoader(fullname, spec.origin, self._source)
        return spec


def install() -> None:
    module, _, source = os.environ.get("RFSQ_MUTANT", "").partition(":")
    if module:
        sys.meta_path.insert(0, MutantFinder(module, Path(source)))


install()
