"""What runs on the robot: numpy plus the one backend in use."""

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
    "FingerprintError",
    "InferenceError",
    "InvalidInputError",
    "SelfTestError",
    "TokenizerError",
    "UnbuiltPrefixError",
]
