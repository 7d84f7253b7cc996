"""What runs on the robot: numpy plus the one backend in use.

Installed it is `rfsq.runtime`; where this folder was copied to, `runtime`; in a checkout either. Each name below is
loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle.compatibility import require_compatible
    from .bundle.errors import (
        BackendUnavailableError,
        BundleError,
        CannotCopyError,
        FingerprintError,
        IncompatibleTokensError,
        InferenceError,
        InvalidInputError,
        MalformedIdsError,
        RfsqError,
        SelfTestError,
        TokenizerError,
        UnbuiltPrefixError,
    )
    from .control.config import ControlConfig, Status
    from .control.decoder import ControlDecoder
    from .control.errors import ControlConfigError, ControlFaultError, RealtimeRefusedError, WrongThreadError
    from .control.realtime import RealtimeConfig, Watchdog, apply_realtime
    from .control.result import ControlResult
    from .policy.vocabulary import PartialTokens, TokenVocabulary
    from .tokenizer import ActionTokenizer

__all__ = [
    "ActionTokenizer",
    "BackendUnavailableError",
    "BundleError",
    "CannotCopyError",
    "ControlConfig",
    "ControlConfigError",
    "ControlDecoder",
    "ControlFaultError",
    "ControlResult",
    "FingerprintError",
    "IncompatibleTokensError",
    "InferenceError",
    "InvalidInputError",
    "MalformedIdsError",
    "PartialTokens",
    "RealtimeConfig",
    "RealtimeRefusedError",
    "RfsqError",
    "SelfTestError",
    "Status",
    "TokenVocabulary",
    "TokenizerError",
    "UnbuiltPrefixError",
    "Watchdog",
    "WrongThreadError",
    "apply_realtime",
    "require_compatible",
]

#: Name to its module.
_MODULES = {
    "ActionTokenizer": "tokenizer",
    "BackendUnavailableError": "bundle.errors",
    "BundleError": "bundle.errors",
    "CannotCopyError": "bundle.errors",
    "ControlConfig": "control.config",
    "ControlConfigError": "control.errors",
    "ControlDecoder": "control.decoder",
    "ControlFaultError": "control.errors",
    "ControlResult": "control.result",
    "FingerprintError": "bundle.errors",
    "IncompatibleTokensError": "bundle.errors",
    "InferenceError": "bundle.errors",
    "InvalidInputError": "bundle.errors",
    "MalformedIdsError": "bundle.errors",
    "PartialTokens": "policy.vocabulary",
    "RealtimeConfig": "control.realtime",
    "RealtimeRefusedError": "control.errors",
    "RfsqError": "bundle.errors",
    "SelfTestError": "bundle.errors",
    "Status": "control.config",
    "TokenVocabulary": "policy.vocabulary",
    "TokenizerError": "bundle.errors",
    "UnbuiltPrefixError": "bundle.errors",
    "Watchdog": "control.realtime",
    "WrongThreadError": "control.errors",
    "apply_realtime": "control.realtime",
    "require_compatible": "bundle.compatibility",
}
#: The same code under another name would have classes and errors of its own.
_OTHER = "runtime" if __name__ == "rfsq.runtime" else "rfsq.runtime"
if set(__all__) <= set(getattr(sys.modules.get(_OTHER), "__all__", ())):
    raise ImportError(
        f"{_OTHER} is imported already, and is the same code as {__name__}: use one of the two names everywhere"
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
