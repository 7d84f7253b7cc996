"""The published model's calls on a bundle; implemented in `runtime/policy/adapter.py`."""

from .policy.adapter import ActionRFSQAE

__all__ = ["ActionRFSQAE"]
