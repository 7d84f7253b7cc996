"""What runs on the robot: numpy plus the one backend in use."""

from runtime.compatibility import require_compatible
from runtime.control_config import ControlConfig, Status
from runtime.control_decoder import ControlDecoder
from runtime.control_errors import ControlConfigError, ControlFaultError, RealtimeRefusedError, WrongThreadError
from runtime.control_realtime import RealtimeConfig, Watchdog, apply_realtime
from runtime.control_result import ControlResult
from runtime.errors import (
    BackendUnavailableError,
    BundleError,
    CannotCopyError,
    FingerprintError,
    IncompatibleTokensError,
    InferenceError,
    InvalidInputError,
    MalformedIdsError,
    SelfTestError,
    TokenizerError,
    UnbuiltPrefixError,
)
from runtime.token_ids import PartialTokens, TokenVocabulary
from runtime.tokenizer import ActionTokenizer

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
