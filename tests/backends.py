"""Backends and packages as a test wants them, whatever this machine has."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from rfsq.runtime.backends import registry
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.bundle import backend_specs
from rfsq.runtime.bundle.backend_specs import BackendSpec
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import Bundle

Factory = Callable[[Bundle], Backend]


def offer(monkeypatch: pytest.MonkeyPatch, factories: Mapping[str, Factory], *, alone: bool = False) -> None:
    """Make these backends in these ways; alone: there is no other."""
    real = registry.factory_of

    def factory_of(spec: BackendSpec) -> Factory:
        if spec.name in factories:
            return factories[spec.name]
        if alone:
            raise BackendUnavailableError(f"{spec.name} is not here")
        return real(spec)

    monkeypatch.setattr(registry, "factory_of", factory_of)


def without_packages(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """As where no package with this beginning is installed."""
    real: Any = backend_specs.is_package_installed
    monkeypatch.setattr(backend_specs, "is_package_installed", lambda name: not name.startswith(prefix) and real(name))
