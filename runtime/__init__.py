"""What runs on the robot: numpy plus the one backend in use."""

from runtime.control_config import ControlConfig, Status
from runtime.control_decoder import ControlDecoder, ControlResult
from runtime.control_errors import ControlConfigError, ControlFaultError, RealtimeRefusedError, WrongThreadError
from runtime.control_realtime import RealtimeConfig, Watchdog, apply_realtime
from runtime.errors import (
    BackendUnavailableError,
    BundleError,
    FingerprintError,
    InferenceError,
    InvalidInputError,
    SelfTestError,
    TokenizerError,
    UnbuiltPrefixError,
)
from runtime.tokenizer import ActionTokenizer

__all__ = [
    "ActionTokenizer",
    "BackendUnavailableError",
    "BundleError",
    "ControlConfig",
    "ControlConfigError",
    "ControlDecoder",
    "ControlFaultError",
    "ControlResult",
    "FingerprintError",
    "InferenceError",
    "InvalidInputError",
    "RealtimeConfig",
    "RealtimeRefusedError",
    "SelfTestError",
    "Status",
    "TokenizerError",
    "UnbuiltPrefixError",
    "Watchdog",
    "WrongThreadError",
    "apply_realtime",
]
