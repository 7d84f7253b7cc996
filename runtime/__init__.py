"""What runs on the robot: numpy plus the one backend in use.

Installed it is `rfsq.runtime`; where this folder was copied to, `runtime`; in a checkout either. Each name below is
loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module

# As type checkers know it: importing `typing` takes longer than all that is here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .bundle.belief_settings import BeliefSettings as BeliefSettings
    from .bundle.belief_settings import load_belief_settings as load_belief_settings
    from .bundle.compatibility import require_compatible as require_compatible
    from .bundle.errors import BackendUnavailableError as BackendUnavailableError
    from .bundle.errors import BundleError as BundleError
    from .bundle.errors import CannotCopyError as CannotCopyError
    from .bundle.errors import FingerprintError as FingerprintError
    from .bundle.errors import IncompatibleTokensError as IncompatibleTokensError
    from .bundle.errors import InferenceError as InferenceError
    from .bundle.errors import InvalidInputError as InvalidInputError
    from .bundle.errors import MalformedIdsError as MalformedIdsError
    from .bundle.errors import RfsqError as RfsqError
    from .bundle.errors import SelfTestError as SelfTestError
    from .bundle.errors import TokenizerError as TokenizerError
    from .bundle.errors import UnbuiltPrefixError as UnbuiltPrefixError
    from .control.belief_config import BeliefConfig as BeliefConfig
    from .control.config import ControlConfig as ControlConfig
    from .control.config import Status as Status
    from .control.decoder import ControlDecoder as ControlDecoder
    from .control.errors import ControlConfigError as ControlConfigError
    from .control.errors import ControlFaultError as ControlFaultError
    from .control.errors import RealtimeRefusedError as RealtimeRefusedError
    from .control.errors import WrongThreadError as WrongThreadError
    from .control.realtime import RealtimeConfig as RealtimeConfig
    from .control.realtime import Watchdog as Watchdog
    from .control.realtime import apply_realtime as apply_realtime
    from .control.result import ControlResult as ControlResult
    from .policy.vocabulary import ChunkVocabulary as ChunkVocabulary
    from .policy.vocabulary import PartialTokens as PartialTokens
    from .policy.vocabulary import TokenVocabulary as TokenVocabulary
    from .tokenizer import ActionTokenizer as ActionTokenizer

#: Module to the names that are loaded from it.
_NAMES = {
    "bundle.belief_settings": ("BeliefSettings", "load_belief_settings"),
    "bundle.compatibility": ("require_compatible",),
    "bundle.errors": (
        "BackendUnavailableError",
        "BundleError",
        "CannotCopyError",
        "FingerprintError",
        "IncompatibleTokensError",
        "InferenceError",
        "InvalidInputError",
        "MalformedIdsError",
        "RfsqError",
        "SelfTestError",
        "TokenizerError",
        "UnbuiltPrefixError",
    ),
    "control.belief_config": ("BeliefConfig",),
    "control.config": ("ControlConfig", "Status"),
    "control.decoder": ("ControlDecoder",),
    "control.errors": ("ControlConfigError", "ControlFaultError", "RealtimeRefusedError", "WrongThreadError"),
    "control.realtime": ("RealtimeConfig", "Watchdog", "apply_realtime"),
    "control.result": ("ControlResult",),
    "policy.vocabulary": ("ChunkVocabulary", "PartialTokens", "TokenVocabulary"),
    "tokenizer": ("ActionTokenizer",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)
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
